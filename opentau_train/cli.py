"""The entry: Hydra composes, `checked` checks, `train.run` trains. Torch is imported only once the settings hold.

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
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from opentau_train.config.arguments import SAID_AGAIN, SHOWING, is_override, settable, without_cfg
from opentau_train.config.choices import own_words
from opentau_train.config.explain import HELP, SECTIONS, explain, refused_flags, refused_override, refused_section
from opentau_train.config.settings import Settings, load_settings
from opentau_train.config.typed import bind
from opentau_train.config.weights import completed
from opentau_train.data.decode.open_files import raise_file_limit
from opentau_train.distributed.stopping import end_on_signals
from opentau_train.errors import EXIT_FAULT, EXIT_OK, EXIT_USER, Fault, Teller, UserError, machine_fault
from opentau_train.sinks.background import THREAD

CONFIG_PACKAGE = "pkg://opentau_train.conf"
_CONFIG_DIR = ("--config-dir", "-cd")
HEAD_START_S = 20.0
"""Seconds that rank 0 has to report a mistake that all ranks found: the others wait so long before they end."""
_USER_ERRORS = (UserError, HydraException, OmegaConfBaseException, yaml.MarkedYAMLError)


def main() -> None:
    """Parse the command line, run, and end the process with the exit codes of `errors`."""
    end_on_signals()
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
    if children or hangs or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Everything is closed and on disk. An ordinary exit would now run the destructors of DDP and of gloo's process
        # group, which joins a thread while holding the interpreter's lock that this thread may wait for: it hung in
        # one of three runs of four ranks on a busy machine (docs/decisions/0002-exit.md).
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
        _print_once(str(explain(error)))
        return EXIT_USER
    except Fault as error:
        if full_error:
            traceback.print_exc()
        if error.teller is Teller.RANK_0:
            _print_once(str(error))
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
    tree = _compose(sys.argv[1:])
    return EXIT_OK if tree is None else _run(tree)


def _compose(arguments: Sequence[str]) -> dict[str, Any] | None:
    """The tree that a run with these arguments has; None where they ask Hydra to show something (`--help`, `--cfg`)."""
    if not any(argument.partition("=")[0] in SHOWING for argument in arguments):
        return compose(arguments)
    rest, shown = without_cfg(arguments)
    try:
        if shown:  # what a run would say of them: Hydra only shows
            checked(compose(rest))
            sys.argv.append(SAID_AGAIN)
        _quietly(_show)
    except ValueError as error:  # what Hydra refuses with a plain ValueError is the user's mistake too
        if isinstance(error, _USER_ERRORS):
            raise
        raise UserError(str(error), remedy=HELP) from error
    return None


@hydra.main(version_base="1.3", config_path=CONFIG_PACKAGE, config_name="train")
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


def _check_overrides(overrides: Sequence[str]) -> None:
    """Name the argument that isn't an override: Hydra's own errors don't."""
    parser = OverridesParser.create()
    for override in overrides:
        try:
            parsed = parser.parse_override(override)
        except HydraException as error:
            raise refused_override(override.lstrip("+"), str(error).splitlines()[0]) from error
        key = parsed.key_or_group
        if not key:
            raise refused_override(override, "it has no key")
        if key.startswith(("hydra.", "hydra/")) and key != "hydra.searchpath":
            remedy = "leave it out; the run's directory is paths.run_dir"
            raise UserError(f"'{key}' is a setting of Hydra, which only composes here", remedy=remedy)
        if parsed.is_sweep_override():
            raise UserError(
                f"'{override.lstrip('+')}' is a sweep over several values, and a process trains one run",
                remedy="start one process a value, or write a list in brackets, KEY=[A,B], and a value with a comma in "
                "two pairs of quotes, 'KEY=\"A,B\"'",
            )
        if key in SECTIONS and not isinstance(parsed.value(), str | list) and not parsed.is_delete():
            raise refused_section(key, override)


def _run(tree: dict[str, Any]) -> int:
    settings = checked(tree)
    from opentau_train import train

    return train.run(settings, tree)


def checked(tree: dict[str, Any]) -> Settings:
    """The typed settings of a composed tree, in which the options of every `_target_` are right too, before data are
    opened or ranks started. Raises `UserError`. Users wait for it, so it may import what a run's classes need to be
    looked at, and no more (`tests/unit/test_layers.py`)."""
    settings = load_settings(tree)
    from opentau_train.models.packing.limits import check_packing
    from opentau_train.models.policy import check_model
    from opentau_train.optim import check_optimizer
    from opentau_train.validation.passes import open_evaluators

    check_model(settings.model, settings.data)
    check_packing(settings)
    bind(settings.scheduler, "scheduler", [])
    check_optimizer(settings.optimizer)
    for name, options in settings.logger.items():
        bind(options, f"logger.{name}", ["context"])
    open_evaluators(settings.validation)
    return settings


def plain(composed: Any) -> dict[str, Any]:
    """The composed configuration as dicts, lists and scalars, interpolations resolved, the model's `completed`."""
    tree: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    return {str(key): completed(value, os.environ) if key == "model" else value for key, value in tree.items()}


def recompose(tree: Mapping[str, Any], arguments: Sequence[str], fixed: Collection[str]) -> dict[str, Any]:
    """A run's composed configuration with the command line's `arguments` over it.

    `data=NAME` takes the sources, and nothing else, of that file: the form of a window stays the run's. Top-level keys
    in `fixed` can't be changed. Raises `UserError`.
    """
    _check_overrides(arguments)
    overrides = OverridesParser.create().parse_overrides([a.lstrip("+") for a in arguments])
    changed = OmegaConf.create(dict(tree))
    for override in overrides:
        key = override.key_or_group
        if key.split(".")[0] in fixed:
            raise UserError(f"{key} is the run's and can't be changed", remedy=f"leave out {override.input_line}")
        if override.is_delete() or "/" in key or "@" in key:
            raise UserError(
                f"'{override.input_line}' is no KEY=VALUE",
                remedy="only values of the run's own keys can be changed here",
            )
        if key == "data":
            with hydra.initialize_config_module("opentau_train.conf", version_base="1.3"):
                chosen = plain(hydra.compose("train", [f"data={override.value()}"]))["data"]
            changed.data.sources, changed.data.builtin_sample = chosen["sources"], chosen["builtin_sample"]
    for override in overrides:
        if override.key_or_group != "data":
            OmegaConf.update(changed, override.key_or_group, override.value(), force_add=True)
    return plain(changed)


def compose(arguments: Sequence[str], primary: str | None = "train") -> dict[str, Any]:
    """The tree of a run with these arguments: `KEY=VALUE`, `GROUP=OPTION`, `--config-dir DIR`; with another `primary`
    than a run's, of what the arguments themselves choose. Raises `UserError` for an argument of another form, and the
    errors of Hydra that `answer` explains."""
    overrides, folder, rest = [], None, iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name in _CONFIG_DIR:
            folder = value if equals else next(rest, "")
        elif name in ("--multirun", "-m"):
            raise UserError("sweeps are not run from one process", where=name, remedy="start one process a setting")
        elif argument.startswith("-"):
            raise refused_flags([argument, *(a for a in rest if not is_override(a))])
        else:
            overrides.append(argument)
    _check_overrides(overrides)
    return _tree(overrides, folder, primary)


def _tree(overrides: Sequence[str], folder: str | None, primary: str | None) -> dict[str, Any]:
    """The tree of these overrides over the file `primary`, with the user's configuration directory `folder`.
    (`hydra.main` would compose it twice, once to learn whether it sweeps.)"""
    search = []
    if folder is not None:
        if not os.path.isdir(folder):
            raise UserError(f"the directory '{folder}' is not there", where="--config-dir", remedy="name one that is")
        quoted = os.path.abspath(folder).replace("\\", "\\\\").replace('"', '\\"')
        search = [f'hydra.searchpath=["file://{quoted}"]']
    with hydra.initialize_config_module("opentau_train.conf", version_base="1.3"):
        words = [*map(settable, overrides), *search]
        words += [_said_again(words)] if primary == "train" else []
        composed = hydra.compose(primary, words, return_hydra_config=True)
        HydraConfig.instance().set_config(composed)  # for `${hydra:...}`
        with open_dict(composed):
            del composed["hydra"]
        return plain(composed)


def _said_again(words: Sequence[str]) -> str:
    """The argument by which Hydra hears once more, after all recipes, what the options say that `words` choose.

    An option that is chosen without them, too, isn't among them: the recipe's numbers are for just that one."""
    parsed = OverridesParser.create().parse_overrides(list(words))
    groups = [o for o in parsed if (o.key_or_group in SECTIONS or "/" in o.key_or_group) and o.package is None]
    choices = {o.key_or_group: str(o.value()) for o in groups if not o.is_delete()}
    if choices:
        rest = [o.input_line for o in parsed if o.key_or_group not in choices]
        usual = hydra.compose("train", rest, return_hydra_config=True).hydra.runtime.choices
        choices = {group: option for group, option in choices.items() if usual.get(group) != option}
    searched = [str(place) for o in parsed if o.key_or_group == "hydra.searchpath" for place in o.value()]
    folders = [p.removeprefix("file://") for p in searched if p.startswith("file://")]
    said = own_words(choices.items(), [files("opentau_train.conf"), *map(Path, folders)])
    ConfigStore.instance().store(group="chosen", name="options", node=said, package="_global_", provider="command line")
    return SAID_AGAIN


def _print_once(text: str) -> None:
    """By rank 0, since every rank would say the same. The others wait before they end: torchrun kills all ranks as soon
    as one has ended, and rank 0 may not have spoken yet. One that is left alone failed alone, and says so itself."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(HEAD_START_S)
    sys.stderr.write(f"error: {text}\n")
