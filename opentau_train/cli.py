"""The entry: Hydra composes, `checked` checks, `loop.run` trains. Torch is imported only once the settings hold.

    python -m opentau_train +recipe=droid_policy trainer.steps=1000
    torchrun --nproc-per-node 8 -m opentau_train +recipe=droid_policy

`KEY=VALUE` sets a key whether or not the composed tree has it already; the typed settings then decide, so a wrong key
gets the same answer in YAML and on the command line.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import shutil
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from opentau_train.composing import checked, compose
from opentau_train.config.arguments import (
    CONFIG_DIR,
    HELPING,
    MULTIRUN,
    SAID_AGAIN,
    SHOWING,
    is_override,
    settable,
    without_cfg,
)
from opentau_train.config.explain import HELP, explain, refused_flags
from opentau_train.config.reference import keys, page
from opentau_train.data.decode.open_files import raise_file_limit
from opentau_train.distributed.stopping import end_on_signals, end_with_agent
from opentau_train.errors import EXIT_FAULT, EXIT_OK, EXIT_USER, Fault, Teller, UserError, machine_fault
from opentau_train.sinks.background import THREAD
from opentau_train.sinks.last_word import tell_last, tell_once

_USER_ERRORS = (UserError, HydraException, OmegaConfBaseException, yaml.MarkedYAMLError)


def main() -> None:
    """Parse the command line, run, and end the process with the exit codes of `errors`."""
    end_on_signals()
    end_with_agent()  # before torch is imported: that may take a minute, and an agent that went meanwhile isn't missed
    threading.excepthook = _tell_of_thread
    sys.argv[1:] = [settable(argument) for argument in sys.argv[1:]]
    end(answer(_compose_and_run))


def _tell_of_thread(thread: threading.ExceptHookArgs) -> None:
    """A thread that met a fault of the machine (TensorBoard's, a full disk) prints nothing: who waits for it tells."""
    if thread.exc_value is None or machine_fault(thread.exc_value) is None:
        threading.__excepthook__(thread)


def end(code: int) -> None:
    """End the process with `code`."""
    sys.stdout.flush()
    sys.stderr.flush()
    children = multiprocessing.active_children()
    for child in children:  # loader workers, left only where a read hangs: they would be waited for
        child.kill()
    hangs = any(thread.name.startswith(THREAD) for thread in threading.enumerate())  # a tracker waits for its server
    cuda = sys.modules.get("torch.cuda")
    on_card = cuda is not None and cuda.is_initialized()
    if children or hangs or on_card or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Everything is closed and on disk. An ordinary exit would now run the destructors of DDP and of gloo's process
        # group, which joins a thread while holding the interpreter's lock that this thread may wait for: it hung in
        # one of three runs of four ranks on a busy machine, and every training on a card ended by an abort there, with
        # code 134 whatever `code` was (docs/decisions/0002-exit.md).
        os._exit(code)
    sys.exit(code)


def answer(work: Callable[[], int]) -> int:
    """Run `work()` and return its exit code; an error that it raises is printed once, in the form of `errors`.

    `work` may open as many files as the machine's hard limit allows.
    """
    raise_file_limit()
    asked = os.environ.get("HYDRA_FULL_ERROR", "")
    full_error = asked not in ("", "0")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its exceptions to us instead of printing and exiting itself
    try:
        return work()
    except _USER_ERRORS as error:
        if full_error:
            traceback.print_exc()
        tell_last(str(explain(error)))
        return EXIT_USER
    except Fault as error:
        if full_error:
            traceback.print_exc()
        if error.teller is Teller.RANK_0:
            tell_once(str(error))
        elif error.teller is Teller.THIS_RANK:
            sys.stderr.write(f"error: {error}\n")
        return EXIT_FAULT
    except Exception as error:
        # Broad, and not to be split: what can be foreseen is split off above. The rest ends with its traceback, or with
        # the machine's fault behind it, and a fault's code, instead of the code that Python would choose, and ranks
        # still end through `end`.
        fault = machine_fault(error)
        if full_error or fault is None:
            traceback.print_exc()
        sys.stderr.write(f"error: {fault or error}\n")
        return EXIT_FAULT
    finally:
        os.environ["HYDRA_FULL_ERROR"] = asked


def _compose_and_run() -> int:
    flags = {argument.partition("=")[0] for argument in sys.argv[1:]}
    if flags & {*MULTIRUN} and not flags & {*SHOWING}:
        from opentau_train import sweep

        return sweep.run(sys.argv[1:])
    tree = _compose(sys.argv[1:])
    return EXIT_OK if tree is None else _run(tree)


def _compose(arguments: Sequence[str]) -> dict[str, Any] | None:
    """The tree that a run with these arguments has; None where they ask Hydra to show something (`--help`, `--cfg`)."""
    if not any(argument.partition("=")[0] in SHOWING for argument in arguments):
        return compose(arguments)
    try:
        _answer_only(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # who read the answer has seen enough: `--help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return None


def _answer_only(arguments: Sequence[str]) -> None:
    """Show what the arguments ask for."""
    if any(argument in HELPING for argument in arguments):
        print(help_page([a for a in arguments if a not in HELPING], shutil.get_terminal_size((100, 24)).columns))
        return
    rest, shown = without_cfg(arguments)
    try:
        if shown:  # what a run would say of them: Hydra only shows
            checked(compose(rest))
            sys.argv += [word for word in HydraConfig.get().overrides.task if word.startswith(SAID_AGAIN)]
        _quietly(_show)
    except ValueError as error:  # what Hydra refuses with a plain ValueError is the user's mistake too
        if isinstance(error, _USER_ERRORS):
            raise
        raise UserError(str(error), remedy=HELP) from error


def help_page(arguments: Sequence[str], width: int) -> str:
    """What each key means: of the places among the arguments, as the others compose it. Raises `UserError`."""
    words, places = [], []
    rest = iter(arguments)
    for argument in rest:
        flag = argument.startswith("-")
        words += [argument, next(rest, "")] if argument in CONFIG_DIR else [argument] if flag or "=" in argument else []
        places += [] if flag or "=" in argument else [argument]
    tree = compose(words)
    return page(keys(tree, HydraConfig.get().runtime.choices), places, width)


@hydra.main(version_base="1.3", config_path="pkg://opentau_train.conf", config_name="train")
def _show(composed: Any) -> None:
    """Hydra shows what it is asked for and never comes here."""


def _quietly(app: Callable[[], None]) -> None:
    """Run Hydra's entry. A flag that it doesn't know becomes a `UserError` instead of a page of usage on every rank."""
    stderr = io.StringIO()
    # Hydra's parser takes its flags after all overrides, not among them.
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda a: not is_override(a))
    try:
        with contextlib.redirect_stderr(stderr):
            app()
    except SystemExit as end:
        if end.code != EXIT_USER:
            raise
        what, _, words = stderr.getvalue().rpartition("error: ")[2].strip().partition("unrecognized arguments: ")
        raise (refused_flags(words.split()) if words else UserError(what, remedy=HELP)) from None
    sys.stderr.write(stderr.getvalue())


def _run(tree: dict[str, Any]) -> int:
    settings = checked(tree)
    from opentau_train import loop

    return loop.run(settings, tree)
