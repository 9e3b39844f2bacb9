"""A run in trackio, which keeps a SQLite file for each project on this machine; TRACKIO_DIR says where.

trackio show --project NAME
"""

import contextlib
import io

try:
    import trackio
    from trackio import context_vars
except ImportError as error:
    raise ImportError('this needs trackio: pip install "fdiv[track]"') from error

from fdiv.adapters.trackers import Place


class Trackio:
    """trackio cannot take steps back: a run that goes on is deleted and written anew from metrics.jsonl.

    Its id is in the run folder's trackio.id, for another folder's run may have the same name.
    """

    def __init__(self, place: Place):
        mark = place.folder / "trackio.id"
        if mark.exists():
            delete(place.project, mark.read_text())
        with quiet():
            self.run = trackio.init(place.project, place.run, config=place.config, embed=False)
        mark.write_text(self.run.id)
        for step, numbers in place.past():
            self.log(step, numbers)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self.run.log(numbers, step=step)

    def close(self) -> None:
        with quiet():
            self.run.finish()
            if context_vars.current_run.get() is self.run:
                context_vars.current_run.set(None)  # or it is finished once more at exit, aloud


def delete(project: str, run_id: str) -> None:
    try:
        runs = list(trackio.Api().runs(project))
    except ValueError:  # no such project: deleted by hand, or on another machine
        return
    for run in runs:
        if run.id == run_id:
            run.delete()


def quiet() -> contextlib.redirect_stdout[io.StringIO]:
    """trackio prints a few lines a run, into the progress bars."""
    return contextlib.redirect_stdout(io.StringIO())
