"""The table that describes the mixture when a run starts."""

from __future__ import annotations

import numpy as np

from opentau_train.data.mixture.mixture import Dataset, Mixture


def mixture_table(mixture: Mixture, num_validation_windows: int) -> str:
    """The summary printed when a run starts: one line for each source, then the
    transforms that the configuration names, and the batch's shape."""
    head = ("source", "episodes", "val", "windows", "weight", "share", "windows/epoch", "control mode", "cameras")
    total = sum(mixture.draws)
    rows: list[tuple[str, ...]] = [head]
    for dataset, drawn in zip(mixture.datasets, mixture.draws, strict=True):
        modes = sorted({mixture.groups[g].control_mode for g in np.unique(dataset.group_of)})
        rows.append(
            (
                dataset.name,
                str(len(dataset.source.episodes)),
                str(int(dataset.held_out.sum())),
                str(dataset.train.num_windows),
                weight_cell(dataset, drawn),
                f"{drawn / max(total, 1):.1%}",
                str(drawn),
                ",".join(modes),
                ",".join(dataset.source.cameras) or "none",
            )
        )
    spec = mixture.spec
    made = [f"{dataset.name}: {', '.join(dataset.transforms)}" for dataset in mixture.datasets if dataset.transforms]
    return "\n".join(
        [
            *align(rows),
            *modes_table(mixture),
            *([f"transforms of {'; '.join(made)}"] if made else []),
            f"batch: state {spec.state_dim}, actions {spec.chunk_length} x {spec.action_dim}, "
            f"{len(spec.cameras)} cameras {spec.image_size[0]}x{spec.image_size[1]}, history {spec.history}; "
            f"validation: {num_validation_windows} windows",
        ]
    )


def modes_table(mixture: Mixture) -> list[str]:
    """A line on each source's modes and the future frames, none where there are no such frames."""
    shares = [f"{d.name}: " + ", ".join(f"{m} {p:.0%}" for m, p in d.settings.modes.items()) for d in mixture.datasets]
    future = f"{mixture.spec.future} future frames of {', '.join(mixture.spec.future_cameras)}"
    return [f"modes of {'; '.join(shares)}; {future}"] if mixture.spec.future else []


def weight_cell(dataset: Dataset, drawn: int) -> str:
    """A dataset's weight as text: the configured one, else "natural", or "validation" where an epoch draws none of it
    (`drawn` windows)."""
    if dataset.settings.weight is not None:
        return f"{dataset.settings.weight:g}"
    return "natural" if drawn else "validation"


def align(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows of cells as lines with columns of equal width."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
