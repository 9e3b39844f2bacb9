"""A run in Weights & Biases; its files are in the run folder's wandb/, its id in wandb.id.

wandb sync runs/*/*/*/*/wandb/offline-run-*   # sends up what was logged offline
"""

import shutil
import uuid
from typing import Literal

try:
    import wandb
except ImportError as error:
    raise ImportError('this needs wandb: pip install "fdiv[track]"') from error

from fdiv.adapters.trackers import Place


class Wandb:
    """Resumed by id. The server takes rising steps alone, so those that it has are not sent again.

    Offline there is no resuming: `wandb sync` replaces a run by what it finds under the same id. So the files
    of a run that was killed are deleted, and the new ones start with the past.
    """

    def __init__(self, place: Place, mode: Literal["offline"] | None = None):
        run_id = remembered(place)
        for old in place.folder.glob(f"wandb/offline-run-*-{run_id}"):
            shutil.rmtree(old)
        self.run = wandb.init(
            project=place.project,
            name=place.run,
            id=run_id,
            resume="allow",
            dir=place.folder,
            config=place.config,
            mode=mode,
            reinit="create_new",  # or else a run that is open already would be returned
            settings=wandb.Settings(console="off", silent=True),  # the terminal shows the progress bars
        )
        self.first = self.run.starting_step
        for step, numbers in place.past():
            self.log(step, numbers)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        if step >= self.first:
            self.run.log(numbers, step=step)

    def close(self) -> None:
        self.run.finish()


def online(place: Place) -> Wandb:
    """In the mode that wandb's settings say (WANDB_MODE); a missing key is an error, not a question."""
    if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False, verify=False):
        raise ValueError("wandb has no API key: run `wandb login`, set WANDB_API_KEY, or write wandb-offline")
    return Wandb(place)


def offline(place: Place) -> Wandb:
    return Wandb(place, "offline")


def remembered(place: Place) -> str:
    """The run's id, the same each time that it goes on."""
    mark = place.folder / "wandb.id"
    if not mark.exists():
        mark.write_text(uuid.uuid4().hex[:12])
    return mark.read_text()
