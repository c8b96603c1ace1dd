"""TensorBoard event files in `RUN_DIR/tensorboard`."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from opentau_train.errors import check_machine
from opentau_train.sinks.base import Sink, SinkContext, of_groups
from opentau_train.sinks.layout import GUIDE, Layout, layout, place_of


class TensorBoardSink(Sink):
    """Scalars, images and texts, under the names and with the charts of `layout`. `flush_seconds` is how long a row may
    wait before it is on disk; `groups`: see `of_groups`.

    Events are made on a thread of the sink's own, a row being one event: with thousands of groups they would hold up
    the training for a quarter of a second. What goes wrong there is raised by the next call, at the latest by `flush`
    or `close`, which wait for all rows. A full disk is a `Fault`.

    A resumed run tells TensorBoard to forget the steps after its checkpoint (they come again).
    """

    def __init__(self, *, context: SinkContext, flush_seconds: int = 30, groups: list[str] | None = None):
        self._start_step, self._groups, self._has_layout = context.start_step, groups, False
        first = context.start_step + 1 if context.start_step else 0
        self._folder = context.run_dir / "tensorboard"
        self._thread = ThreadPoolExecutor(1, "tensorboard")
        self._pending: deque[Future[None]] = deque()
        self._writer: SummaryWriter
        self._make(lambda: self._open(first, flush_seconds))
        self._wait()
        self.text("Start here", GUIDE)
        self.text("Config", "```json\n" + json.dumps(context.config, indent=2, default=str) + "\n```")

    def write(self, step: int, row: Mapping[str, float]) -> None:
        values, now = of_groups(row, self._groups), time.time()
        if not self._has_layout and any(tag.startswith("Training/") for tag in row):
            charts, self._has_layout = layout(row), True
            self._make(lambda: self._lay_out(charts))
        self._make(lambda: self._add(step, values, now))

    def image(self, step: int, tag: str, array: NDArray[np.uint8]) -> None:
        self._make(lambda: self._writer.add_image(tag, array, step, dataformats="HWC"))

    def text(self, tag: str, text: str) -> None:
        self._make(lambda: self._writer.add_text(tag, text, self._start_step))

    def flush(self) -> None:
        self._make(lambda: self._writer.flush())
        self._wait()

    def close(self) -> None:
        try:
            self._make(lambda: self._writer.close())
        finally:
            self._thread.shutdown()
        self._wait()

    def _make(self, call: Callable[[], None]) -> None:
        """Make the call on the thread after those before it. Raises what one of these has raised."""
        self._pending.append(self._thread.submit(call))
        while self._pending and self._pending[0].done():
            self._settle(self._pending.popleft())

    def _wait(self) -> None:
        while self._pending:
            self._settle(self._pending.popleft())

    def _settle(self, call: Future[None]) -> None:
        """TensorBoard writes on one more thread, too, whose errors come with the calls after."""
        try:
            call.result()
        except OSError as error:
            check_machine(error, self._folder)
            raise

    # -- on the thread -----------------------------------------------------------------------------------------------

    def _open(self, first: int, flush_seconds: int) -> None:
        self._writer = SummaryWriter(str(self._folder), purge_step=first, flush_secs=flush_seconds)

    def _lay_out(self, charts: Layout) -> None:
        self._writer.add_custom_scalars(
            {category: {name: ["Multiline", tags] for name, tags in of.items()} for category, of in charts.items()}
        )

    def _add(self, step: int, values: Mapping[str, float], now: float) -> None:
        assert self._writer.file_writer is not None, "it is there until the writer is closed"
        named = ((place_of(tag, values), float(value)) for tag, value in values.items())
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in named])
        self._writer.file_writer.add_summary(summary, step, now)
