"""What `data.sources.NAME` may say of a LeRobot dataset beyond the settings of the mixture.

Apart from `source`, which reads it: options are checked, and named in answers, where nothing else is imported.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar

from opentau_train.config.bounds import positive
from opentau_train.config.data import SourceSettings
from opentau_train.config.resuming import SAFE, warned
from opentau_train.errors import UserError

if TYPE_CHECKING:
    from opentau_train.data.lerobot.source import LeRobotDataset


PROMPTS = warned("other prompts from here on")


@dataclass(frozen=True)
class LeRobotSource:
    """The options of a LeRobot dataset, v3.0, v2.1 or v2.0: see `opentau_train.data.source.SourceOptions`."""

    selects: ClassVar[bool] = True

    cameras: dict[str, str] | tuple[str, ...] | None = None
    """{camera name: column}, or columns; null = every camera of the dataset."""
    state: tuple[str, ...] | None = None
    """Columns, or slices that meta/modality.json names; `actions` alike."""
    actions: tuple[str, ...] | None = None
    """As `state`."""
    drop_dims: tuple[str, ...] = ()
    """Dimensions of state and actions to leave out, by name or pattern (`*`; `column.3` is `column[3]`)."""
    prompt_columns: tuple[str, ...] = field(default=(), metadata=PROMPTS)
    """Columns that hold the instruction, as text or as its number in meta/tasks; none = the dataset's tasks."""
    optional_prompts: bool = field(default=False, metadata=PROMPTS)
    """Whether a dataset may lack some of `prompt_columns`, or all: then its tasks are the prompts."""
    prompt_separator: str | None = field(default=None, metadata=PROMPTS)
    """Splits one text into alternatives, e.g. ' | '."""
    weight_column: str | None = field(default=None, metadata=warned("other sample weights from here on"))
    """Column of a number a row that a window's training loss is weighted by: its first row's, not negative."""
    tolerance_s: Annotated[float, positive] = field(default=1e-4, metadata=SAFE)
    """Seconds by which a video's frame may miss its row's time."""

    links: tuple[str, ...] = field(default=(), metadata=SAFE)
    """Directories outside of the dataset's own that its links may lead to; the Hub's cache may be always."""

    def open(self, name: str, settings: SourceSettings) -> LeRobotDataset:
        """Read the metadata of the dataset in `settings.root`. Raises `UserError` for what is missing, broken or
        unknown."""
        from opentau_train.data.lerobot.source import open_dataset

        where = f"data.sources.{name}"
        if settings.root is None:
            raise UserError(
                f"{where} has neither root nor repo_id",
                where=where,
                remedy=f"set {where}.root=PATH or {where}.repo_id=OWNER/NAME",
            )
        return open_dataset(name, settings, self)
