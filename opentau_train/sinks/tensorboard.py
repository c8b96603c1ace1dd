"""TensorBoard event files in `RUN_DIR/tensorboard`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from torch.utils.tensorboard import SummaryWriter

from opentau_train.errors import check_machine
from opentau_train.sinks.base import Sink, SinkContext


class TensorBoardSink(Sink):
    """Scalars, images and texts; `flush_seconds` is how long a row may wait before it is on disk.

    A resumed run tells TensorBoard to forget the steps after its checkpoint (they come again).
    """

    def __init__(self, *, context: SinkContext, flush_seconds: int = 30):
        self._start_step = context.start_step
        first = context.start_step + 1 if context.start_step else 0
        self._folder = context.run_dir / "tensorboard"
        with self._written():
            self._writer = SummaryWriter(str(self._folder), purge_step=first, flush_secs=flush_seconds)
        self.text("Config", "```json\n" + json.dumps(context.config, indent=2, default=str) + "\n```")

    def write(self, step: int, row: Mapping[str, float]) -> None:
        with self._written():
            for tag, value in row.items():
                self._writer.add_scalar(tag, value, step)

    def image(self, step: int, tag: str, array: NDArray[np.uint8]) -> None:
        with self._written():
            self._writer.add_image(tag, array, step, dataformats="HWC")

    def text(self, tag: str, text: str) -> None:
        with self._written():
            self._writer.add_text(tag, text, self._start_step)

    def flush(self) -> None:
        with self._written():
            self._writer.flush()

    def close(self) -> None:
        with self._written():
            self._writer.close()

    @contextmanager
    def _written(self) -> Iterator[None]:
        """TensorBoard's own thread writes; its errors come with the calls after. A full disk becomes a `Fault`."""
        try:
            yield
        except OSError as error:
            check_machine(error, self._folder)
            raise
