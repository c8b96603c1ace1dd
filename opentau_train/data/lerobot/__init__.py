"""LeRobot-format datasets, v3.0, v2.1 and v2.0: metadata, episodes, rows and frames.

`opentau_train.data.lerobot.LeRobotSource` is the name that configurations use; what it imports needs no torch.
"""

from opentau_train.data.lerobot.options import LeRobotSource

__all__ = ["LeRobotSource"]
