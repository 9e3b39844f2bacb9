"""The systems that the cases are run on. A module is imported when its system is asked for, not before."""

import importlib
from dataclasses import dataclass

from conformance.system import System


@dataclass(frozen=True)
class Missing:
    """A system whose package cannot be imported here."""

    name: str
    install: str
    reason: str


# name: (module, the line that installs it)
SYSTEMS: dict[str, tuple[str, str]] = {
    "fdiv": ("conformance.systems.fdiv", "make test"),
    "trl": ("conformance.systems.trl", 'pip install "fdiv[trl]"'),
    "liger": ("conformance.systems.liger", "pip install --no-deps liger-kernel"),
    "torchtune": ("conformance.systems.torchtune", "pip install --no-deps torchtune"),
    "ms-swift": ("conformance.systems.ms_swift", "pip install --no-deps ms-swift"),
    "verl": (
        "conformance.systems.verl",
        "pip install --no-deps verl ray tensordict msgpack jsonschema jsonschema-specifications referencing "
        "rpds-py attrs pyvers cloudpickle orjson codetiming omegaconf",
    ),
}


def load(name: str) -> System | Missing:
    """The adapter of this name, or why there is none."""
    if name not in SYSTEMS:
        raise ValueError(f"unknown system {name!r}; there are {', '.join(SYSTEMS)}")
    module, install = SYSTEMS[name]
    try:
        return importlib.import_module(module).Adapter()
    except (ImportError, RuntimeError) as error:  # lazy packages wrap the one in the other
        return Missing(name, install, str(error))
