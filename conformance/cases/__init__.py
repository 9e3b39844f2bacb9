"""All cases, in the order of their ids; one file a section."""

from types import ModuleType

from conformance.case import Case
from conformance.cases import direction, estimators, masks_and_vocabulary, truncation, zeros_and_precision

SECTIONS: dict[str, ModuleType] = {
    "Direction, sign, convention": direction,
    "Estimators": estimators,
    "Zero mass, infinities, precision": zeros_and_precision,
    "Support truncation": truncation,
    "Masks, shifts, normalisation, vocabulary": masks_and_vocabulary,
}


def cases_of(section: ModuleType) -> list[Case]:
    return [value for value in vars(section).values() if isinstance(value, Case)]


CASES: list[Case] = [c for section in SECTIONS.values() for c in cases_of(section)]
