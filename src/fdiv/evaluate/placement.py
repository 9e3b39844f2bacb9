"""Where to write a label beside its point so that it covers neither a point nor another label."""

import numpy as np

ANGLES = np.deg2rad([0, 180, 90, 270, 35, 145, 325, 215, 60, 120, 240, 300])
RADII = (7, 13, 22, 34, 50, 68)
DIRECTIONS = np.tile(np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1), (len(RADII), 1))
DISTANCES = np.repeat(RADII, len(ANGLES))  # [candidates], as DIRECTIONS [candidates, 2]


def place(anchors, sizes, obstacles, frame):
    """Lower left corners [labels, 2] of text boxes, by greedy choice and a few second thoughts.

    anchors: [labels, 2]; sizes: [labels, 2] width and height; obstacles: [points, 2] not to be
    covered; frame: (x0, y0, x1, y1) to stay inside. All in one unit (pixels).
    """
    corners = np.full(anchors.shape, np.nan)  # nan: not placed yet, and overlaps with nothing
    for _ in range(4):
        for i, (anchor, size) in enumerate(zip(anchors, sizes, strict=True)):
            tried = anchor + DIRECTIONS * (DISTANCES[:, None] + size / 2) - size / 2
            others = np.arange(len(anchors)) != i
            cost = _cost(tried, size, corners[others], sizes[others], obstacles, frame)
            corners[i] = tried[np.argmin(DISTANCES + cost)]
    return corners


def _cost(corners, size, other_corners, other_sizes, obstacles, frame):
    """What each candidate [candidates, 2] covers, leaves the frame by and overlaps."""
    low, high = (corners - 2)[:, None], (corners + size + 2)[:, None]
    covered = ((obstacles > low) & (obstacles < high)).all(axis=2).sum(axis=1)
    outside = np.clip(frame[:2] - low[:, 0], 0, None) + np.clip(high[:, 0] - frame[2:], 0, None)
    width = np.minimum(high, other_corners + other_sizes + 1) - np.maximum(low, other_corners - 1)
    overlap = np.nan_to_num(np.prod(np.clip(width, 0, None), axis=2)).sum(axis=1)
    return 9 * covered + 60 * outside.sum(axis=1) + 3 * overlap
