"""The entry: Hydra composes, `config.load` checks, `train.run` trains. Torch is imported only for the last.

    python -m opentau_train +recipe=droid_policy trainer.steps=1000
    torchrun --nproc-per-node 8 -m opentau_train +recipe=droid_policy

`KEY=VALUE` sets a key whether or not the composed tree has it already; the typed settings then decide, so a wrong key
gets the same answer in YAML and on the command line.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import sys
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from opentau_train import config
from opentau_train.errors import EXIT_FAULT, EXIT_OK, EXIT_USER, UserError, did_you_mean

CONFIG_PACKAGE = "pkg://opentau_train.conf"
_VALUE_OVERRIDE = re.compile(r"^(?!hydra\.)[A-Za-z_][\w-]*(\.[\w\-]+)+=")
_RESUME = re.compile(r"^\+{0,2}resume=(?!\{)")
_USER_ERRORS = (UserError, HydraException, OmegaConfBaseException)


def main() -> None:
    """Parse the command line, run, and end the process with the exit codes of `errors`."""
    sys.argv[1:] = [_settable(argument) for argument in sys.argv[1:]]
    end(answer(_compose_and_run))


def end(code: int) -> None:
    """End the process with `code`."""
    sys.stdout.flush()
    sys.stderr.flush()
    children = multiprocessing.active_children()
    for child in children:  # loader workers, left only where a read hangs: they would be waited for
        child.kill()
    if children or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Everything is closed and on disk. An ordinary exit would now run the destructors of DDP and of gloo's process
        # group, which joins a thread while holding the interpreter's lock that this thread may wait for: it hung in
        # one of three runs of four ranks on a busy machine (docs/decisions/0002-exit.md).
        os._exit(code)
    sys.exit(code)


def answer(work: Callable[[], int]) -> int:
    """The exit code of `work()`; what it raises is told in the form of `errors`, once."""
    full_error = os.environ.setdefault("HYDRA_FULL_ERROR", "") not in ("", "0")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its exceptions to us instead of printing and exiting itself
    try:
        return work()
    except _USER_ERRORS as error:
        if full_error:
            traceback.print_exc()
        _print_once(_explain(error))
        return EXIT_USER
    except Exception as error:  # the last line of defence: say what failed below the traceback
        traceback.print_exc()
        sys.stderr.write(f"error: {error}\n")
        return EXIT_FAULT


def _compose_and_run() -> int:
    _compose()
    return _run(_composed.pop()) if _composed else EXIT_OK


def _compose() -> None:
    """Hydra's part. What it refuses with a plain ValueError is the user's mistake too."""
    try:
        if _flag(sys.argv[1:], "--cfg", "-c"):
            config.load(compose(sys.argv[1:]))  # what a run would say of them: `--cfg` never reaches `_app`
        _app()
    except ValueError as error:
        if isinstance(error, _USER_ERRORS):
            raise
        raise UserError(str(error), remedy="see python -m opentau_train --help") from error


_composed: list[dict[str, Any]] = []


@hydra.main(version_base="1.3", config_path=CONFIG_PACKAGE, config_name="train")
def _app(composed) -> None:
    """Only hand the tree out: Hydra would report an error of the run itself, on every rank."""
    _composed.append(plain(composed))


def _run(tree: dict[str, Any]) -> int:
    settings = config.load(tree)
    from opentau_train import train  # imports torch: only once the settings hold

    return train.run(settings, tree)


def plain(composed) -> dict[str, Any]:
    """The composed configuration as dicts, lists and scalars, interpolations resolved."""
    tree = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    assert isinstance(tree, dict), "the primary configuration is a mapping"
    return {str(key): value for key, value in tree.items()}


def recompose(tree: Mapping[str, Any], arguments: Sequence[str], fixed: Collection[str]) -> dict[str, Any]:
    """A run's composed configuration with the command line's `arguments` over it.

    `data=NAME` takes the sources, and nothing else, of that file: the form of a window stays the run's. Top-level keys
    in `fixed` can't be changed. Raises `UserError`.
    """
    overrides = OverridesParser.create().parse_overrides([a.lstrip("+") for a in arguments])
    changed = OmegaConf.create(dict(tree))
    for override in overrides:
        key = override.key_or_group
        if key.split(".")[0] in fixed:
            raise UserError(
                f"{key} is the checkpoint's and can't be changed", remedy=f"leave out {override.input_line}"
            )
        if key == "data":
            with hydra.initialize_config_module("opentau_train.conf", version_base="1.3"):
                chosen = plain(hydra.compose("train", [f"data={override.value()}"]))["data"]
            changed.data.sources, changed.data.builtin_sample = chosen["sources"], chosen["builtin_sample"]
    for override in overrides:
        if override.key_or_group != "data":
            OmegaConf.update(changed, override.key_or_group, override.value(), force_add=True)
    return plain(changed)


def compose(arguments: Sequence[str]) -> dict[str, Any]:
    """The tree that a run with these arguments would have (`KEY=VALUE`, `GROUP=OPTION`, `--config-dir DIR`), for
    tools. Raises what `answer` tells."""
    overrides = [_settable(a) for a in arguments if not a.startswith("-") and "=" in a]
    folder = _flag(arguments, "--config-dir", "-cd")
    if folder:
        overrides.append(f"hydra.searchpath=[file://{os.path.abspath(folder)}]")
    with hydra.initialize_config_module("opentau_train.conf", version_base="1.3"):
        return plain(hydra.compose("train", overrides))


def _settable(argument: str) -> str:
    """`a.b=1` as `++a.b=1`: set it, there or not. Group choices (`data=droid`) and Hydra's own keys stay.

    `resume=X` becomes `resume.checkpoint=X`: Hydra would replace the whole node, and `resume.data=restart` with it.
    """
    argument = _RESUME.sub("resume.checkpoint=", argument)
    return f"++{argument}" if _VALUE_OVERRIDE.match(argument) else argument


def _flag(arguments: Sequence[str], *names: str) -> str | None:
    """The value of a command-line flag, `--name value` or `--name=value`; "" when it comes last."""
    for place, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name in names:
            return value or (arguments[place + 1] if place + 1 < len(arguments) else "")
    return None


def _print_once(text: str) -> None:
    """On rank 0 only: every rank composes the same settings and would say the same."""
    if os.environ.get("RANK", "0") == "0":
        sys.stderr.write(f"error: {text}\n")


def _explain(error: Exception) -> str:
    """An error of ours, or of Hydra's, in our form and at most 8 lines."""
    if isinstance(error, UserError):
        return str(error)
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    text = "\n".join(str(link).strip() for link in chain)
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    missing = re.search(r"Could not find '([\w/]+)/([\w-]+)'", text) or re.search(
        r"In '.*': Could not find '([\w/]+)/([\w-]+)'", text
    )
    if missing:
        return _explain_missing_choice(missing.group(1), missing.group(2), text)
    key = re.search(r"Key '([\w.]+)' is not in struct|Could not override '([\w./@]+)'", text)
    if key:
        name = key.group(2) or key.group(1)
        name = name if not key.group(1) or key.group(2) else key.group(1)
        return _explain_unknown_key(name)
    return "\n".join([*lines[:6], "  remedy: see python -m opentau_train --help"])


def _explain_missing_choice(group: str, choice: str, text: str) -> str:
    options = re.search(rf"Available options in '{re.escape(group)}':\s*((?:\n\t.*)+)", text)
    known = options.group(1).split() if options else []
    return str(
        UserError(
            f"{group}={choice}: no such configuration{did_you_mean(choice, known)}",
            remedy=f"{group} is one of: {', '.join(known)}" if known else "see python -m opentau_train --help",
        )
    )


def _explain_unknown_key(name: str) -> str:
    groups = ("recipe", "debug")
    if name in groups:
        return str(UserError(f"{name} is not in the defaults", remedy=f"write +{name}=NAME"))
    known = [*config.Settings.__dataclass_fields__, *groups]
    return str(UserError(f"unknown key '{name}'{did_you_mean(name, known)}", remedy=f"keys: {', '.join(known)}"))
