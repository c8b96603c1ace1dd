"""The sinks of a run: which of them are opened when."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from opentau_train.config.settings import Settings
from opentau_train.config.typed import TARGET, bind, instantiate
from opentau_train.sinks.base import Sink, SinkContext, Sinks

ALWAYS = {TARGET: "opentau_train.sinks.jsonl.JsonlSink"}

Agree = Callable[[Callable[[], Any]], Any]
"""Makes a call on all ranks, and raises on all what it raises on one."""


def context_of(
    settings: Settings, tree: dict[str, Any], run_dir: Path, start_step: int, classes: Mapping[str, int] | None = None
) -> SinkContext:
    """What the sinks of the run in `run_dir` are told of it."""
    return SinkContext(run_dir, run_dir.name, settings.trainer.steps, start_step, tree, classes or {})


@contextmanager
def begun(settings: Settings, context: SinkContext, is_main: bool, agree: Agree) -> Iterator[dict[str, Sink]]:
    """{name: sink} of those entries of the setting `logger` that are opened before the data (`Sink.before_data`): a
    server that refuses is known before minutes are spent. None where nothing is left to train. Rank 0 writes; the other
    ranks have none. What `open_sinks` hasn't taken is closed at the end. Collective; raises `UserError` on all ranks.
    """
    opened: dict[str, Sink] = {}

    def begin() -> None:
        for name, options in settings.logger.items():
            if getattr(bind(options, f"logger.{name}", ["context"])[0], "before_data", False):
                opened[name] = instantiate(options, f"logger.{name}", context=context)

    try:
        agree(lambda: begin() if is_main and context.start_step < context.total_steps else None)
        yield opened
    finally:
        Sinks(list(opened.values())).close()  # all, even when one fails to


def open_sinks(
    tree: Mapping[str, Mapping[str, Any]], context: SinkContext, begun: dict[str, Sink] | None = None
) -> Sinks:
    """`metrics.jsonl`, always and first, then every entry of the setting `logger`: {name: {_target_, options}}. Those
    in `begun` are taken out of it as they are.

    Raises `UserError` for an entry that can't be built, after closing those that were.
    """
    with ExitStack() as undo:
        opened: list[Sink] = []
        for name, options in {"jsonl": ALWAYS, **tree}.items():
            sink = begun.pop(name, None) if begun else None
            opened.append(instantiate(options, f"logger.{name}", context=context) if sink is None else sink)
            undo.callback(opened[-1].close)
        undo.pop_all()
    return Sinks(opened)
