"""What each key means, its type, range and default: `--help` and docs/configuration.md, from the settings' own words.

A typed setting says what it is in the string below its field. The keys of a class that `_target_` names are those of
the chosen file of conf/, which says it in the comment behind each key.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import json
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import Annotated, Any, Literal, NamedTuple, Union

from opentau_train.config.settings import Settings
from opentau_train.config.typed import defaults, locate
from opentau_train.config.weights import WeightSettings
from opentau_train.errors import UserError, did_you_mean

_CONF = resources.files("opentau_train.conf")
_COMMENT = re.compile(r"^ *(?P<key>[A-Za-z_]\w*):.*?(?:\s#\s+(?P<words>.*))?$")
_NAMES = {int: "integer", float: "number", str: "text", bool: "true|false", type(None): "null", dict: "mapping"}

_PAGE = """\
opentau_train trains robot policies on mixtures of LeRobot-format datasets.

Usage: python -m opentau_train +recipe=NAME [KEY=VALUE ...]

Configuration groups (choose with GROUP=OPTION; recipe and debug with +GROUP=OPTION):
{groups}

Keys, their values by default, or with the other arguments of this command, and what they may be (set with KEY=VALUE):
{keys}

Examples:
  python -m opentau_train +recipe=droid_policy                                the DROID recipe
  python -m opentau_train +recipe=lerobot data.sources.main.root=PATH         any LeRobot dataset
  torchrun --nproc-per-node 8 -m opentau_train +recipe=droid_policy           eight processes
  python -m opentau_train --cfg job +recipe=droid_policy                      show what would run
  python -m opentau_train --help model model=pi0                              the keys of one place only
"""


class Key(NamedTuple):
    """A setting: where it is, what it may be, what it is now, and what it means."""

    path: str
    kind: str
    value: str
    words: str


def keys(tree: Mapping[str, Any], choices: Mapping[str, str]) -> list[Key]:
    """All keys of a run's composed `tree`, in its order; `choices` is {group: the option that was chosen}."""
    return list(_typed(Settings, tree, "", choices))


def narrowed(found: Sequence[Key], places: Sequence[str]) -> list[Key]:
    """Those at or below one of `places`; all without any. Raises `UserError` for a place where there is none."""
    for place in places:
        if not any(_below(key.path, place) for key in found):
            known = {key.path.rsplit(".", depth)[0] for key in found for depth in range(key.path.count(".") + 1)}
            raise UserError(
                f"there is no key '{place}'{did_you_mean(place, sorted(known | {key.path for key in found}))}",
                where="--help",
                remedy="name a key or a section, such as trainer or data.sources",
            )
    return [key for key in found if not places or any(_below(key.path, place) for place in places)]


def _below(path: str, place: str) -> bool:
    parts, asked = path.split("."), place.split(".")
    return len(parts) >= len(asked) and all(p in (a, "NAME") for p, a in zip(parts, asked, strict=False))


def as_text(found: Sequence[Key], width: int) -> str:
    """A paragraph a key, of lines of at most `width` columns."""
    lines = []
    for key in found:
        lines += textwrap.wrap(f"{key.path}={key.value}  [{key.kind}]", width, subsequent_indent="      ")
        lines += textwrap.wrap(key.words, width, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def as_tables(found: Sequence[Key]) -> str:
    """Markdown: a section a first part of the keys, a row a key."""
    pages: list[str] = []
    section = None
    for key in sorted(found, key=lambda key: "." in key.path):
        first = key.path.partition(".")[0] if "." in key.path else "the run"
        if first != section:
            section = first
            pages.append(f"\n## {section}\n\n| key | type | default | meaning |\n|---|---|---|---|")
        cells = (f"`{key.path}`", key.kind, f"`{key.value}`", key.words)
        pages.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(pages)


def page(found: Sequence[Key], places: Sequence[str], width: int) -> str:
    """The answer to `--help`, or to `--help PLACE ...`."""
    text = as_text(narrowed(found, places), width)
    return text if places else _PAGE.format(groups=groups(), keys=text)


def groups() -> str:
    """A line a group of files in conf/, with its options."""
    lines = []
    for folder in sorted(_folders(_CONF, "")):
        options = sorted(f.name.removesuffix(".yaml") for f in _CONF.joinpath(folder).iterdir() if f.name.endswith("l"))
        lines.append(f"{folder}: {', '.join(options)}" if options else "")
    return "\n".join(line for line in lines if line)


def _folders(folder: Any, path: str) -> Iterator[str]:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.name.startswith("_"):
            yield f"{path}{entry.name}"
            yield from _folders(entry, f"{path}{entry.name}/")


def _typed(cls: type, tree: Mapping[str, Any], path: str, choices: Mapping[str, str]) -> Iterator[Key]:
    """The keys of the settings `cls`, whose values are those of `tree` where it has them."""
    hints, words = typing.get_type_hints(cls, include_extras=True), _strings(cls)
    for field in dataclasses.fields(cls):
        key, hint = field.metadata.get("key", field.name), hints[field.name]
        where, value = f"{path}{key}", tree.get(key, _default(field))
        inner = typing.get_args(hint)[1] if typing.get_origin(hint) is dict else None
        if field.metadata.get("rest"):
            yield from _options(path, tree, cls, choices)
        elif dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from _typed(hint, value if isinstance(value, Mapping) else {}, f"{where}.", choices)
        elif isinstance(inner, type) and dataclasses.is_dataclass(inner):
            yield from _typed(inner, {}, f"{where}.NAME.", choices)
        elif typing.get_origin(hint) is dict and _CONF.joinpath(where.replace(".", "/")).is_dir():
            yield from (_typed(WeightSettings, {}, "model.", choices) if where == "model" else ())
            yield from _chosen(where, value, choices)
        elif key != "_target_":
            yield Key(where, kind(hint), _shown(value), words.get(field.name, "") or _said(where, choices))


def _options(path: str, tree: Mapping[str, Any], cls: type, choices: Mapping[str, str]) -> Iterator[Key]:
    """The keys that the class at `path` takes beside the settings `cls`."""
    place, own = path.rstrip("."), {f.metadata.get("key", f.name) for f in dataclasses.fields(cls)}
    target = getattr(cls, "target", None)
    if place in choices:  # the chosen file names them
        yield from (key for key in _chosen(place, tree, choices) if key.path.rpartition(".")[2] not in own)
    elif target is not None:
        located = locate(target, place)
        hints, words = typing.get_type_hints(located, include_extras=True), _strings(located)
        for name, (default, _) in defaults(target).items():
            yield Key(f"{path}{name}", kind(hints.get(name, Any)), _shown(default), words.get(name, ""))


def _chosen(place: str, tree: Mapping[str, Any], choices: Mapping[str, str]) -> Iterator[Key]:
    """The keys of a section of which conf/ has files, as the chosen one has them."""
    for key, value in tree.items():
        where = f"{place}.{key}"
        if isinstance(value, Mapping) and "_target_" in value:
            yield from _chosen(where, value, choices)
        elif key != "_target_":
            yield Key(where, kind(type(value)), _shown(value), _said(where, choices))


def _said(path: str, choices: Mapping[str, str]) -> str:
    """The comment behind a key in the chosen file of its group, or in those that the file begins from."""
    section, _, key = path.rpartition(".")
    group, _, name = section.replace(".", "/").rpartition("/")
    files = (
        [f"{section.replace('.', '/')}/{choices.get(section, 'default')}", f"{group}/{name}"] if section else ["train"]
    )
    for place in files:  # grows
        file = _CONF.joinpath(f"{place}.yaml")
        text = file.read_text("utf-8") if file.is_file() else ""
        words = _comments(text).get(key)
        if words:
            return words
        files += [f"{place.rpartition('/')[0]}/{other}" for other in re.findall(r"^  - (\w+)$", text, flags=re.M)]
    return ""


def _comments(text: str) -> dict[str, str]:
    """{key: the comment behind it} of a file's first level, or the comment lines above it."""
    said: dict[str, str] = {}
    above: list[str] = []
    for line in text.splitlines():
        match = _COMMENT.match(line)
        if match:
            said.setdefault(match["key"], match["words"] or " ".join(above))
        above = [*above, line[2:]] if line.startswith("# ") else []
    return said


@functools.cache
def _strings(cls: Any) -> dict[str, str]:
    """{field: the string below it} of a class and those that it inherits from."""
    said: dict[str, str] = {}
    for base in reversed(inspect.getmro(cls) if inspect.isclass(cls) else ()):
        if not base.__module__.startswith("opentau_train"):
            continue
        body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]).body
        for line, after in itertools.pairwise(body):
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and isinstance(after, ast.Expr):
                said[line.target.id] = inspect.cleandoc(str(ast.literal_eval(after.value))).replace("\n", " ")
    return said


def kind(hint: Any) -> str:
    """What a value of the type `hint` may be, in words: `integer greater than 0, or null`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        ranges = [str(bound) for bound in args[1:] if dataclasses.is_dataclass(bound)]
        return " ".join([kind(args[0]), *ranges])
    if origin in (Union, types.UnionType):
        return ", or ".join(kind(arg) for arg in args)
    if origin is Literal:
        return "|".join(map(str, args))
    if origin in (tuple, list, Sequence):
        return f"list of {' and '.join(kind(a) for a in args if a is not Ellipsis)}"
    if hint in (list, tuple):
        return "list"
    return "mapping" if origin is dict else _NAMES.get(hint, "any")


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else "???"


def _shown(value: Any) -> str:
    """A value as the command line takes it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, str):
        return value
    return re.sub(r'(?<=[{\[:,])"|"(?=[}\]:,])', "", json.dumps(value, separators=(",", ":"), default=str))
