"""Small networks that make predictions of a stage's output, for students of any architecture."""

from typing import Any

from torch import Tensor, nn


def layout_of(shapes: Any) -> str:
    """Whether stages [a, b] are "channels" [channels, places] or "tokens" [tokens, width].

    Features are the last such stage without its places, so that their width tells. ValueError if it does not.
    """
    flat = [shape for shape in shapes.stages if len(shape) == 2]
    if not flat:
        return "channels"
    first, last = flat[-1]
    if (first == shapes.width) == (last == shapes.width):
        raise ValueError(
            f"a stage of shape {tuple(flat[-1])} before features of width {shapes.width} may be channels or "
            "tokens first: write OFA(layout='channels') or OFA(layout='tokens')"
        )
    return "channels" if first == shapes.width else "tokens"


def branch(shapes: Any, number: int, layout: str) -> nn.Module:
    """From the output of the stage of this number to the classes' logits.

    Maps [channels, ...places] are halved by separable convolutions as often as stages of maps follow, tokens
    see as many encoder layers, at least one; both are averaged. A vector [width] sees one hidden layer.
    """
    shape, width = shapes.stages[number], max(shapes.width, shapes.p_width)
    later = sum(len(stage) == len(shape) for stage in shapes.stages[number + 1 :])
    head = nn.Linear(width, shapes.classes)
    if len(shape) == 1:
        return nn.Sequential(nn.Linear(shape[0], width), nn.ReLU(), head)
    if len(shape) == 2 and layout == "tokens":
        layers = [_encoder(shape[1]) for _ in range(max(1, later))]
        return nn.Sequential(
            *layers, nn.LayerNorm(shape[1]), _MeanOfTokens(), nn.Linear(shape[1], shapes.classes)
        )
    places = len(shape) - 1
    if places not in (1, 2):
        raise ValueError(
            f"a stage of shape {tuple(shape)} is neither a vector, nor tokens, a signal or an image"
        )
    return nn.Sequential(*_downsamplers(shape[0], width, later, places), _MeanOfPlaces(), head)


def _downsamplers(channels: int, width: int, count: int, places: int) -> list[nn.Module]:
    """`count` separable convolutions of stride 2, or one of a single place where no stage follows."""
    convolution = nn.Conv2d if places == 2 else nn.Conv1d
    if not count:
        return [convolution(channels, width, 1), nn.ReLU()]
    norm, layers = nn.BatchNorm2d if places == 2 else nn.BatchNorm1d, []
    for n in range(count):
        out = width if n == count - 1 else min(2 * channels, width)
        layers += [
            convolution(channels, channels, 3, stride=2, padding=1, groups=channels, bias=False),
            convolution(channels, out, 1, bias=False),
            norm(out),
            nn.ReLU(),
        ]
        channels = out
    return layers


def _encoder(width: int) -> nn.Module:
    heads = next(h for h in (4, 2, 1) if width % h == 0)
    return nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, batch_first=True, norm_first=True)


class _MeanOfTokens(nn.Module):
    def forward(self, tokens: Tensor) -> Tensor:
        return tokens.mean(1)


class _MeanOfPlaces(nn.Module):
    def forward(self, maps: Tensor) -> Tensor:
        return maps.flatten(2).mean(-1)
