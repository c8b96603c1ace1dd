"""How pictures are decoded. Apart from decoding, so that what is only told of it needs no library for videos."""

from __future__ import annotations

from typing import NamedTuple

from opentau_train.strangers import MAX_PIXELS


class Decoding(NamedTuple):
    """How videos and images are decoded: larger pictures than `max_pixels` are refused before; `skip_loop_filter` and
    `video_decoder` as the settings of that name in `data`."""

    max_pixels: int = MAX_PIXELS
    skip_loop_filter: bool = False
    video_decoder: str = "cpu"

    @property
    def remark(self) -> str:
        """To the error of a video that isn't decoded."""
        if self.video_decoder == "cpu":
            return ""
        return f" (by {self.video_decoder}: no card takes every codec, size and format; data.video_decoder=cpu does)"


AS_USUAL = Decoding()
"""What holds where nobody says otherwise."""
