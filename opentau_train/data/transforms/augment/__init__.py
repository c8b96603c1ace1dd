"""Samples as they might have been: pictures cropped, turned, in another light; left and right exchanged.

`Augment` and `Mirror` are the names that configurations use; nothing else in the package needs this room.
"""

from opentau_train.data.transforms.augment.mirror import Mirror
from opentau_train.data.transforms.augment.pictures import Augment

__all__ = ["Augment", "Mirror"]
