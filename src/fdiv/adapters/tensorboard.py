"""A run in TensorBoard: event files in the run folder's tensorboard/.

tensorboard --logdir runs
"""

import json

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError as error:
    raise ImportError('this needs tensorboard: pip install "fdiv[track]"') from error

from fdiv.adapters.trackers import Place


class TensorBoard:
    """Scalars by step. With `purge_step` TensorBoard takes back what a run logged before it was killed."""

    def __init__(self, place: Place):
        files = place.folder / "tensorboard"
        new = not any(files.glob("events.out.tfevents.*"))
        self.writer = SummaryWriter(str(files), purge_step=place.start_step + 1)
        if new:
            config = json.dumps(place.config, indent=4, ensure_ascii=False)
            self.writer.add_text("config", "\n".join("    " + line for line in config.splitlines()), 0)
            for step, numbers in place.past():
                self.log(step, numbers)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()  # a kill would lose what TensorBoard holds back, two minutes of it

    def close(self) -> None:
        self.writer.close()
