"""From the command line's words to the composed, checked configuration of a run. Hydra composes, and does no more."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf, open_dict

from opentau_train.config.arguments import CONFIG_DIR, SAID_AGAIN, is_override, settable
from opentau_train.config.choices import own_words
from opentau_train.config.explain import SECTIONS, refused_flags, refused_override, refused_section
from opentau_train.config.settings import Settings, load_settings
from opentau_train.config.typed import bind
from opentau_train.config.weights import completed
from opentau_train.errors import UserError


def compose(arguments: Sequence[str], primary: str | None = "train") -> dict[str, Any]:
    """The tree of a run with these arguments: `KEY=VALUE`, `GROUP=OPTION`, `--config-dir DIR`; with another `primary`
    than a run's, of what the arguments themselves choose. Raises `UserError` for an argument of another form, and the
    errors of Hydra that `answer` explains."""
    overrides, folder, rest = [], None, iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name in CONFIG_DIR:
            folder = value if equals else next(rest, "")
        elif name in ("--multirun", "-m"):
            raise UserError("a sweep is of several runs, and one is composed", where=name, remedy="leave it out")
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
    words = [*map(settable, overrides), *search]
    words += said_again(words) if primary == "train" else []
    with hydra.initialize_config_module("opentau_train.conf", version_base="1.3"):
        composed = hydra.compose(primary, words, return_hydra_config=True)
        HydraConfig.instance().set_config(composed)  # for `${hydra:...}`
        with open_dict(composed):
            del composed["hydra"]
        return plain(composed)


def said_again(words: Sequence[str]) -> list[str]:
    """The argument, if one is needed, by which Hydra hears once more, after all recipes, what the options say that
    `words` choose. An option that is chosen without them, too, isn't heard: the recipe's numbers are for just that."""
    parsed = OverridesParser.create().parse_overrides(list(words))
    groups = [o for o in parsed if (o.key_or_group in SECTIONS or "/" in o.key_or_group) and o.package is None]
    choices = {o.key_or_group: str(o.value()) for o in groups if not o.is_delete()}
    if not choices:
        return []
    rest = [str(o.input_line) for o in parsed if o.key_or_group not in choices]
    with hydra.initialize_config_module("opentau_train.conf", version_base="1.3"):
        usual = hydra.compose("train", rest, return_hydra_config=True).hydra.runtime.choices
    places = next((o.value() for o in parsed if o.key_or_group == "hydra.searchpath"), None)
    searched = [str(place) for place in places] if isinstance(places, list) else []
    folders = [p.removeprefix("file://") for p in searched if p.startswith("file://")]
    others = [(group, option) for group, option in choices.items() if usual.get(group) != option]
    said = own_words(others, [files("opentau_train.conf"), *map(Path, folders)])
    name = hashlib.blake2b(OmegaConf.to_yaml(said).encode(), digest_size=8).hexdigest()
    ConfigStore.instance().store(group="chosen", name=name, node=said, package="_global_", provider="command line")
    return [SAID_AGAIN + name]


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
        sink, _ = bind(options, f"logger.{name}", ["context"])
        if hasattr(sink, "check"):  # one of somebody's own may have none
            sink.check()
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
        if key == "hparams_search":
            raise UserError("a search is a sweep over several runs", where=override, remedy="add --multirun")
        if key.startswith(("hydra.", "hydra/")) and key != "hydra.searchpath":
            remedy = "leave it out; the run's directory is paths.run_dir"
            raise UserError(f"'{key}' is a setting of Hydra, which only composes here", remedy=remedy)
        if parsed.is_sweep_override():
            raise UserError(
                f"'{override.lstrip('+')}' is a sweep over several values, and a process trains one run",
                remedy="add --multirun, or write a list in brackets, KEY=[A,B], and a value with a comma in two pairs "
                "of quotes, 'KEY=\"A,B\"'",
            )
        if key in SECTIONS and not isinstance(parsed.value(), str | list) and not parsed.is_delete():
            raise refused_section(key, override)
