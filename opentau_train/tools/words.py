"""What the reader of a dataset says, in the words of a tool that is given a directory and has no settings."""

from __future__ import annotations

from pathlib import Path

from opentau_train.errors import UserError

NAME = "NAME"
"""The source's name in what is logged: as in the documents, since the tool's user gives it one only later."""
_REMEDIES = {
    "root": "give the directory that holds meta/ and data/",
    "actions": "name them: --actions COLUMN ...",
    "exclude_episodes": "restore the file",
}
"""{a setting that a source's remedy speaks of: what to do about it here, where there are no settings}"""


def in_own_words(error: UserError, root: Path) -> UserError:
    """An error of the source in `root`, which speaks of `data.sources`, with the tool's own arguments in it."""
    source = f"data.sources.{NAME}"
    where = {source: str(root), f"{source}.actions": "--actions"}.get(error.where, error.where)
    key = next((key for key in _REMEDIES if f"{source}.{key}" in error.remedy), None)
    return UserError(error.what, where=where, remedy=error.remedy if key is None else _REMEDIES[key])
