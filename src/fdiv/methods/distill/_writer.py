"""What the methods of this folder ask of who writes their text."""

from fdiv.sample._sampler import Sampler


def require_sampler(sampler: object) -> None:
    """Raise the TypeError that says what a `sampler` is."""
    if isinstance(sampler, type) or not isinstance(sampler, Sampler):
        raise TypeError(
            f"a sampler says who writes the responses, got {sampler!r}; write Offline(), Mix(lmbda), "
            "AdaptiveReplay() or another of fdiv.sample"
        )
