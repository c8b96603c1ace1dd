"""How far the reading is that a run begins with: shown before there are sinks."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

log = logging.getLogger(__name__)
ROOT = logging.getLogger("opentau_train")

UNSEEN_SECONDS, LINE_SECONDS = 1.0, 10.0
"""How long reading may take unseen on a terminal; and elsewhere, where a line of the log tells of it as often."""
BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"


def has_terminal() -> bool:
    """Whether a bar can be drawn: some containers give a terminal without a width, where it would stay empty."""
    return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0


class Reading:
    """Told by `Progress.enter` what is read, shows rows read and the time left: as a bar on a terminal, elsewhere by a
    line every `LINE_SECONDS`; nothing where it takes no time, or not `shown`. For one thread."""

    def __init__(self, shown: bool = True, now: Callable[[], float] = time.monotonic):
        self._shown, self._now = shown, now
        self._bar: tqdm | None = None
        self._closing = ExitStack()
        self._total, self._first, self._began, self._told = 0, 0, 0.0, 0.0

    def __call__(self, part: str, done: int, total: int) -> None:
        """`done` of the `total` rows are read; 0 of 0 where the part of the run is another."""
        if not self._shown or total == 0:
            self.close()
            return
        if total != self._total:  # it begins
            self.close()
            self._total, self._first = total, done
            self._began = self._told = self._now()
            self._bar = self._drawn(part, total) if has_terminal() else None
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
        elif self._now() - self._told >= LINE_SECONDS:
            self._told = self._now()
            left = (self._told - self._began) / max(1, done - self._first) * (total - done)
            log.info("%s: %s of %s, %s left", part, f"{done:,}", f"{total:,}", tqdm.format_interval(round(left)))

    def _drawn(self, part: str, total: int) -> tqdm:
        self._closing.enter_context(logging_redirect_tqdm([ROOT]))  # else a line of the log is glued to the bar
        bar = tqdm(
            desc=part, total=total, unit_scale=True, leave=False, delay=UNSEEN_SECONDS, file=sys.stderr,
            dynamic_ncols=True, bar_format=BAR,
        )  # fmt: skip
        bar.desc = part  # tqdm adds a colon
        self._closing.callback(bar.close)
        return bar

    def close(self) -> None:
        """Take the bar away."""
        self._closing.close()
        self._bar, self._total = None, 0
