"""One mp4 file's packets in storage order, found by time or from an exact place; and decoders for them.

A `VideoFile` is the demuxer only: it gives packets, and keeps its place among them. The cursors of `video.py`, which
may share one file, decode them and choose the frames.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.codec.hwaccel import HWAccel
from numpy.typing import NDArray

from opentau_train.data.decode.decoding import Decoding
from opentau_train.errors import UserError
from opentau_train.strangers import MAX_PIXELS, check_plain

PACKETS_PER_READ, BYTES_PER_READ = 64, 256 * 2**10
"""Packets a cursor takes at once: what spreads the cost of a seek when cursors alternate on one file. The bytes bound
what hundreds of cursors hold where a packet is large (and reading it dwarfs a seek)."""

OPTIONS = {
    "protocol_whitelist": "file",
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi",
    "enable_drefs": "0",
}
"""A file holds its frames itself: no list of other files or addresses (HLS, concat, DASH, SDP) is followed."""

MIN_SKIPPED = 4
"""Packets that a jump to a later keyframe must save, else decoding on is cheaper than flushing the decoder."""


class VideoError(Exception):
    """A frame can't be had; the text names the file and the cause."""


class DepthVideoError(VideoError):
    """A video's values are no colours."""


class Clock(NamedTuple):
    """When a file's first and last frames are shown (inf: not told), in seconds; how many it has (0: not told)."""

    first: float
    last: float
    frames: int


FARTHEST = 2.0**62
"""Ticks; a demuxer's times are of 64 bits."""

Coding = tuple[str, bytes | None, int, int, int, int, int, int]
"""What a decoder is made from: codec, its extradata, width, height, colour range, space, primaries, transfer."""


def held(ticks: float) -> int:
    """The tick that `ticks` lie in, or the farthest that a demuxer takes: metadata may name any time."""
    return math.floor(min(max(ticks, -FARTHEST), FARTHEST))


def new_decoder(coding: Coding, decoding: Decoding) -> av.VideoCodecContext:
    """A decoder independent of any demuxer; one thread, because workers are the parallelism. It refuses pictures of
    more pixels than `decoding.max_pixels`, which a stream may come to have on the way, and leaves out the codec's own
    smoothing between blocks where that is asked for and can be (H.264, HEVC). Raises `UserError` for a decoder of the
    card that there isn't."""
    decoder = _on_card(coding[0]) if decoding.video_decoder == "nvdec" else av.CodecContext.create(coding[0], "r")
    assert isinstance(decoder, av.VideoCodecContext)
    decoder.extradata = coding[1]
    decoder.width, decoder.height = coding[2:4]
    decoder.color_range, decoder.colorspace, decoder.color_primaries, decoder.color_trc = coding[4:]
    decoder.thread_count = 1
    unfiltered = {"skip_loop_filter": "all"} if decoding.skip_loop_filter else {}
    decoder.options = {"max_pixels": str(decoding.max_pixels), **unfiltered}
    return decoder


_OF_CARDS = {"libdav1d": "av1", "libaom-av1": "av1", "libvpx-vp9": "vp9"}
"""{decoder of the CPU: FFmpeg's own of the same codec, which asks the card}."""


def _on_card(codec: str) -> av.CodecContext:
    """A decoder of the rank's card, NVDEC. Its pictures come back to memory, where they are brought to size."""
    # The process's one context on the card, shared by its decoders: one for each takes half a gigabyte and 0.3 s.
    options: dict[str, object] = {"primary_ctx": "1"}
    card = HWAccel("cuda", os.environ.get("LOCAL_RANK", "0"), allow_software_fallback=False, options=options)
    try:
        decoder = av.CodecContext.create(_OF_CARDS.get(codec, codec), "r", hwaccel=card)
    except (av.FFmpegError, OSError) as error:
        raise UserError(
            f"no card can be asked to decode videos: {error}", where="data.video_decoder=nvdec", remedy="set it to cpu"
        ) from error
    if not decoder.is_hwaccel:
        raise UserError(
            f"a card decodes no {codec}", where="data.video_decoder=nvdec", remedy="set it to cpu, or tools.reencode"
        )
    return decoder


class VideoFile:
    """One open demuxer. Times are in ticks of `time_base` seconds; `coding` is what its packets are decoded with."""

    def __init__(self, path: Path, max_pixels: int = MAX_PIXELS):
        self.path = path
        check_plain(path)
        self._container = av.open(f"file:{path}", options=dict(OPTIONS), metadata_errors="replace")
        streams = self._container.streams.video
        time_base = streams[0].time_base if streams and streams[0].codec_context is not None else None
        if time_base is None:
            self._container.close()
            raise VideoError(f"{path} has no video stream that can be decoded")
        self._stream = streams[0]
        self.time_base = float(time_base)
        codec = self._stream.codec_context
        # What only the container says (colr atom) must reach the frames, or their conversion to RGB differs.
        colours = codec.color_range, codec.colorspace, codec.color_primaries, codec.color_trc
        self.coding: Coding = (codec.name, codec.extradata, codec.width, codec.height, *colours)
        self._index = self._stream.index_entries
        if codec.width * codec.height > max_pixels:
            self._container.close()
            raise VideoError(f"{path}: pictures of {codec.width} x {codec.height} pixels, more than data.max_pixels")
        channels = codec.format.components if codec.format is not None else ()
        if len(channels) == 1 and channels[0].bits > 8:
            self._container.close()
            raise DepthVideoError(f"{path} has one channel of {channels[0].bits} bits, a depth and no picture")
        self._last_dts: int | None = None

    def close(self) -> None:
        self._container.close()

    @property
    def clock(self) -> Clock:
        """By the file's own header."""
        index, frames, base = self._index, self._stream.frames, self.time_base
        begins = self._stream.start_time or 0
        if frames and len(index) == frames:  # by decode times: those of the first and the last frame are as late
            return Clock(begins * base, (begins + index[-1].timestamp - index[0].timestamp) * base, frames)
        interval = 1.0 / float(self._stream.average_rate or math.inf)
        ends = (self._container.duration or math.inf) / av.time_base  # in Matroska from 0 on
        if self._stream.duration is not None:
            ends = (begins + self._stream.duration) * base
        return Clock(begins * base, ends - interval, frames)

    @property
    def keyframes(self) -> NDArray[np.float64]:
        """[K] seconds from the first frame to each keyframe that the file's index knows: of a container without one,
        the first only."""
        ticks = [entry.timestamp for entry in self._index if entry.is_keyframe]
        return (np.array(ticks or [0], np.float64) - (self._index[0].timestamp if ticks else 0)) * self.time_base

    def shown(self, begin: int, end: int) -> list[int]:
        """When frames are shown, in ticks by rising time: at least all of those from `begin` to `end`."""
        self._last_dts = None  # the place among the packets is lost
        self._container.seek(max(held(begin), 0), stream=self._stream)
        ticks: list[int] = []
        for packet in self._container.demux(self._stream):
            if packet.pts is not None:
                ticks.append(packet.pts)
            if packet.dts is not None and packet.dts > end:
                break
        return sorted(ticks)

    def packets_from_keyframe(self, ticks: int) -> list[av.Packet]:
        """The next packets from the last keyframe that is shown at `ticks` or before; else from the first."""
        limit, first_dts = held(ticks), None
        while True:
            self._container.seek(limit, stream=self._stream)
            packets = self._read()
            if not packets or packets[0].pts is None or packets[0].pts <= ticks or packets[0].dts == first_dts:
                return packets
            # Pictures before an open GOP's keyframe in presentation order need the GOP before.
            first_dts = packets[0].dts
            assert first_dts is not None, "_read gives no packet without a decode time"
            limit = first_dts - 1

    def packets_after(self, dts: int) -> list[av.Packet]:
        """The packets that follow the one of `dts` in storage order; none at the end of the file."""
        if self._last_dts == dts:
            return self._read()
        # A seek to any frame lands on `dts` or, by the reorder delay, a little before it: skip to the exact place.
        self._container.seek(dts, stream=self._stream, any_frame=True)
        if self._skip_to(dts):
            return self._read()
        self._container.seek(dts, stream=self._stream)
        if self._skip_to(dts):
            return self._read()
        raise VideoError(f"{self.path}: the demuxer doesn't find its place at dts {dts} again")

    def skips_packets(self, fed_dts: int, ticks: float) -> bool:
        """Whether the keyframe for `ticks` (decode time) lies so far after the packet of `fed_dts`, the last one
        decoded, that a jump to it is worth it: more than `MIN_SKIPPED` packets."""
        key = self._index.search_timestamp(held(ticks))
        if key < 0:
            return False
        return key - self._index.search_timestamp(fed_dts, any_frame=True) > MIN_SKIPPED

    def _skip_to(self, dts: int) -> bool:
        for packet in self._container.demux(self._stream):
            if packet.dts is None or packet.dts > dts:
                return False
            if packet.dts == dts:
                return True
        return False

    def _read(self) -> list[av.Packet]:
        packets: list[av.Packet] = []
        size = 0
        self._last_dts = None
        for packet in self._container.demux(self._stream):
            if packet.dts is None:
                if packet.size:
                    raise VideoError(f"{self.path}: a packet has no decode time")
                return packets  # the end of the file
            packets.append(packet)
            size += packet.size
            if len(packets) == PACKETS_PER_READ or size >= BYTES_PER_READ:
                break
        if packets:
            self._last_dts = packets[-1].dts
        return packets
