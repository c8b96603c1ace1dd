"""What a finder answers."""

from __future__ import annotations

from dataclasses import dataclass

UNKNOWN = "unknown"
"""The value of a finding where the data don't tell."""

LIKELY = 0.5
"""The confidence of what is only usual: it contradicts no declaration, but casts doubt on it."""


@dataclass(frozen=True)
class Finding:
    """What the data say of one thing, `name`, of the dimensions (cameras, episodes) `dims`: `value`, or `UNKNOWN`.
    `evidence` are the numbers that it rests on; `confidence` in [0, 1] says how sure a known value is."""

    name: str
    dims: tuple[str, ...]
    value: str
    evidence: str
    confidence: float = 1.0

    @property
    def is_usual(self) -> bool:
        return self.confidence <= LIKELY

    @property
    def is_known(self) -> bool:
        return self.value != UNKNOWN


def by_value(name: str, dims: tuple[str, ...], values: list[str], evidence: list[str]) -> list[Finding]:
    """One finding for each distinct value, with the dimensions that have it, and the evidence of the first of them."""
    places = {value: [i for i, v in enumerate(values) if v == value] for value in dict.fromkeys(values)}
    return [Finding(name, tuple(dims[i] for i in at), value, evidence[at[0]]) for value, at in places.items()]
