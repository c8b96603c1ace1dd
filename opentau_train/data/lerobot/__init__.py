"""LeRobot-format datasets, v2.1 and v3.0: metadata, episodes, rows and frames.

`opentau_train.data.lerobot.LeRobotSource` is the name that configurations use for the class in `source`.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    """The source's class, imported when it is asked for: a check of metadata needs none of what it imports."""
    if name == "LeRobotSource":
        from opentau_train.data.lerobot.source import LeRobotSource

        return LeRobotSource
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
