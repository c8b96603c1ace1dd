"""What Hydra, OmegaConf and the YAML parser refuse, said in the program's form: what, where, remedy."""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterator, Sequence
from importlib import resources

import yaml
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue

from opentau_train.config.data import SourceSettings
from opentau_train.config.pointers import pointer
from opentau_train.config.settings import Settings
from opentau_train.config.typed import defaults
from opentau_train.errors import UserError, did_you_mean

HELP = "see python -m opentau_train --help"
ON_COMMAND_LINE = ("recipe", "debug", "experiment", "hparams_search")
"""Groups that the primary configuration has no choice of: they are added with +GROUP=NAME."""
_CONF = resources.files("opentau_train.conf")
SECTIONS = tuple(name for name in Settings.__dataclass_fields__ if (_CONF / name).is_dir())
"""The top-level keys that are groups of files in conf/."""


def explain(error: Exception) -> UserError:
    """The mistake behind an exception that composing the configuration ended with."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, yaml.MarkedYAMLError):
        return _broken_yaml(error)
    key = getattr(error, "full_key", None)
    if isinstance(error, MissingMandatoryValue):
        return UserError(f"{key} is required but not set", remedy=f"add {key}=VALUE")
    if isinstance(error, InterpolationResolutionError):
        return _broken_interpolation(str(key), str(error))
    return _refused_choice(_whole_text(error))


def refused_override(override: str, reason: str) -> UserError:
    """A command-line argument that is no override."""
    return UserError(
        f"can't read the argument '{override}': {reason}",
        remedy="write KEY=VALUE, and a value with special characters in two pairs of quotes: 'KEY=\"VALUE\"'",
    )


def refused_flags(words: Sequence[str]) -> UserError:
    """Options that the program doesn't have, each with its value behind it or after `=`: often keys with dashes."""
    known, texts = set(_dotted(Settings)), []
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        if not word.startswith("--"):
            continue
        if not equals and place + 1 < len(words) and not words[place + 1].startswith("-"):
            value = words[place + 1]
        text = pointer(name, value or None)
        if text is None and name[2:] in known:
            text = f"write {name[2:]}={value or 'VALUE'}, without dashes"
        texts += [] if text is None else [text]
    what = f"unrecognized argument{'s' if len(words) > 1 else ''}: {' '.join(words)}"
    return UserError(what, remedy="; ".join(dict.fromkeys(texts)) or HELP)


def refused_section(key: str, override: str) -> UserError:
    """A value for a whole section, e.g. `trainer=3`."""
    return UserError(
        f"{key} is a section of settings, got {override}",
        remedy=f"choose one of its files ({key}={_options(key)[0]}) or set one of its keys ({key}.KEY=VALUE)",
    )


def unknown_key(name: str) -> UserError:
    """A key at the top level that isn't there, with the nearest that is, wherever it stands."""
    if name in ON_COMMAND_LINE:
        return UserError(
            f"{name} has no default that could be replaced", where=f"{name}=...", remedy=f"write +{name}=NAME"
        )
    top = [*Settings.__dataclass_fields__, *ON_COMMAND_LINE]
    elsewhere = pointer(name)
    if elsewhere is not None:
        return UserError(f"unknown key '{name}'", remedy=elsewhere)
    by_name = {key.rpartition(".")[2]: key for key in (*_dotted(Settings), *top)}
    near = difflib.get_close_matches(name.rpartition(".")[2], by_name, n=1, cutoff=0.6)
    hint = f": did you mean '{by_name[near[0]]}'?" if near else ""
    return UserError(f"unknown key '{name}'{hint}", remedy=f"the top-level keys are: {', '.join(top)}")


def _broken_yaml(error: yaml.MarkedYAMLError) -> UserError:
    mark = error.problem_mark or error.context_mark
    where = f"{mark.name}, line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return UserError(f"the file is not YAML: {error.problem or error.context}", where=where, remedy="correct the line")


def _broken_interpolation(key: str, text: str) -> UserError:
    variable = re.search(r"Environment variable '(\w+)' not found", text)
    if variable:
        name = variable.group(1)
        return UserError(
            f"{key} is taken from the environment variable {name}, which is not set",
            where=key,
            remedy=f"export {name}=VALUE, or set {key}=VALUE",
        )
    return UserError(f"{key}: {text.splitlines()[0]}", where=key, remedy=f"correct its ${{...}}, or set {key}=VALUE")


def _refused_choice(text: str) -> UserError:
    """From Hydra's own words, since its exceptions carry nothing else."""
    missing = re.search(r"Could not (?:find|load) '([\w/]+)/([\w.-]+)'", text)
    if missing:
        group, choice = missing.groups()
        if group.startswith("hydra/"):
            what = f"{group}={choice} is a plugin of Hydra that isn't installed"
            return UserError(what, remedy='pip install "opentau_train[sweep]"')
        listed = re.search(rf"Available options in '{re.escape(group)}':\s*((?:\n\t.*)+)", text)
        options = listed.group(1).split() if listed else _options(group)
        return UserError(
            f"{group}={choice}: no such configuration{did_you_mean(choice, options)}",
            remedy=f"{group} is one of: {', '.join(options)}" if options else HELP,
        )
    twice = re.search(r"Multiple values for ([\w/@.]+)\.", text)
    if twice:
        group = twice.group(1)
        return UserError(
            f"{group} has a choice already", where=f"+{group}=...", remedy=f"write {group}=NAME, without +"
        )
    broken = re.search(r"Error parsing override '(.*)'\n(.*)", text)
    if broken:
        return refused_override(*broken.groups())
    key = re.search(r"Could not override '([\w./@-]+)'|Key '([\w.-]+)' is not in struct", text)
    if key:
        return unknown_key(key.group(1) or key.group(2))
    first, *others = [line.strip() for line in text.splitlines() if line.strip()] or [""]
    return UserError(first, details="\n".join(f"  {line}" for line in others[:4]), remedy=HELP)


def _whole_text(error: BaseException) -> str:
    """The texts of an exception and of its causes: Hydra wraps what says the most."""
    parts: list[str] = []
    link: BaseException | None = error
    while link is not None:
        parts.append(str(link))
        link = link.__cause__
    return "\n".join(parts)


def _options(group: str) -> list[str]:
    """The files of a group of the program's own configuration."""
    folder = _CONF.joinpath(*group.split("/"))
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def namesakes(name: str) -> list[str]:
    """The program's settings that are called `name`, in whatever section: those of its types and, of the objects that a
    section names by `_target_`, the options in conf/."""
    options: set[str] = set()
    for section in SECTIONS:
        for choice in _options(section):
            tree = yaml.safe_load(_CONF.joinpath(section, f"{choice}.yaml").read_text()) or {}
            options |= {f"{section}.{key}" for key in tree if "_target_" in tree}
    return sorted(key for key in {*_dotted(Settings), *options} if key.rpartition(".")[2] == name)


def _dotted(cls: type, path: str = "") -> Iterator[str]:
    """Every key of the settings, e.g. `trainer.steps`, `data.sources.NAME.root`."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint, key = hints[field.name], f"{path}{field.name}"
        inner = typing.get_args(hint)[-1] if typing.get_origin(hint) is dict else hint
        if field.metadata.get("rest"):  # options stand beside the settings; the usual source's can be had without torch
            yield from (f"{path}{name}" for name in (defaults(SourceSettings.target) if cls is SourceSettings else ()))
        elif dataclasses.is_dataclass(inner) and isinstance(inner, type):
            yield from _dotted(inner, f"{key}." if inner is hint else f"{key}.NAME.")
        else:
            yield key
