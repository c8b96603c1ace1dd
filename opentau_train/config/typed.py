"""From a plain tree (dicts, lists, scalars) to typed, frozen dataclasses and to objects named by `_target_`.

Errors name the key's full path, the nearest valid name and the remedy.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
import sys
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, Literal, Union

from opentau_train.config.pointers import pointers
from opentau_train.errors import UserError, did_you_mean

TARGET = "_target_"


def build(cls: type, tree: Any, path: str) -> Any:
    """An instance of the dataclass `cls` from the mapping `tree`; `path` is the mapping's place in the config.

    A field with the metadata `{"key": NAME}` is read from that key: `_target_`, or a word that Python reserves. One
    with `{"rest": True}` holds the keys that no field has, as they are. Raises `UserError` for an unknown key (where no
    field is such), a missing one, a wrong type, and whatever the class's own `check(path)` finds.
    """
    if not isinstance(tree, Mapping):
        raise _wrong(path or "the configuration", "a mapping of settings", tree)
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {f.metadata.get("key", f.name): f for f in dataclasses.fields(cls)}
    rest = next((fields.pop(key) for key, f in list(fields.items()) if f.metadata.get("rest")), None)
    values = {}
    if rest is None:
        _refuse_unknown(tree, fields, path)
    else:
        values[rest.name] = {key: value for key, value in tree.items() if key not in fields}
    for key, field in fields.items():
        where = f"{path}.{key}" if path else key
        if key in tree:
            values[field.name] = convert(hints[field.name], tree[key], where)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"{where} is required but not set", remedy=f"add {where}=VALUE")
    made = cls(**values)
    made.check(path)
    return made


def convert(hint: Any, value: Any, path: str) -> Any:
    """`value` as the type `hint` says, or `UserError`. Integers pass as floats and lists as tuples; nothing else is
    coerced. `Annotated[TYPE, positive]` bounds the value by a function of its path and itself."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin is Annotated:
        made = convert(args[0], value, path)
        for bound in args[1:]:
            bound(path, made)
        return made
    if origin in (Union, types.UnionType):
        return _convert_union(args, value, path)
    if origin is Literal:
        return _convert_literal(args, value, path)
    if origin is tuple:
        return _convert_tuple(args, value, path)
    if origin in (list, Sequence):
        return list(_convert_tuple((args[0], ...), value, path))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _wrong(path, "a mapping", value)
        return {str(k): convert(args[1], v, f"{path}.{k}") for k, v in value.items() if v is not None or args[1] is Any}
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return build(hint, value, path)
    return _convert_scalar(hint, value, path)


def _convert_union(args: tuple, value: Any, path: str) -> Any:
    """`value` as the first type that takes it. An error inside a mapping or a list (a wrong item) is that type's own;
    otherwise all types are named."""
    options = [a for a in args if a is not type(None)]
    if value is None and len(options) < len(args):
        return None
    if value is not None and len(options) == 1:
        return convert(options[0], value, path)
    failures = []
    for option in options:
        try:
            return convert(option, value, path)
        except UserError as error:
            failures.append(error)
    inside = [error for error in failures if not error.what.startswith(f"{path} must be ")]
    if inside:
        raise inside[0]
    raise _wrong(path, " or ".join(_name(a) for a in args), value)


def _convert_literal(args: tuple, value: Any, path: str) -> Any:
    # A type of its own for each: 1, 1.0 and true are equal in Python.
    if any(value == choice and type(value) is type(choice) for choice in args):
        return value
    choices = ", ".join(str(a) for a in args)
    remedy = f"set {path} to one of: {choices}"
    if isinstance(value, bool):
        remedy += "; in quotes, since YAML reads a bare yes, no, on or off as true or false"
    raise UserError(f"{path}={value!r} is not a choice{did_you_mean(str(value), map(str, args))}", remedy=remedy)


def _convert_tuple(args: tuple, value: Any, path: str) -> tuple:
    if isinstance(value, str | Mapping) or not hasattr(value, "__iter__"):
        raise _wrong(path, "a list", value)
    items = list(value)
    if args[-1] is Ellipsis:
        return tuple(convert(args[0], item, f"{path}[{i}]") for i, item in enumerate(items))
    if len(items) != len(args):
        raise _wrong(path, f"a list of {len(args)} values", value)
    return tuple(convert(a, item, f"{path}[{i}]") for i, (a, item) in enumerate(zip(args, items, strict=True)))


def _convert_scalar(hint: Any, value: Any, path: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
        return float(value)
    right = isinstance(value, typing.get_origin(hint) or hint) and not (hint is int and isinstance(value, bool))
    if not right or (isinstance(value, float) and not math.isfinite(value)):
        raise _wrong(path, _name(hint), value)
    return value


_NAMES = {
    int: "an integer",
    float: "a number",
    str: "a string",
    bool: "true or false",
    type(None): "null",
    dict: "a mapping",
    tuple: "a list",
    list: "a list",
    Sequence: "a list",
}


def _name(hint: Any) -> str:
    kind = typing.get_origin(hint) or hint
    if kind is Literal:
        return f"one of {', '.join(map(str, typing.get_args(hint)))}"
    if dataclasses.is_dataclass(kind):
        return "a mapping of settings"
    return _NAMES.get(kind, str(hint))


def _wrong(path: str, expected: str, value: Any) -> UserError:
    return UserError(
        f"{path} must be {expected}, got {value!r} ({type(value).__name__})",
        remedy=f"change {path} on the command line or in its YAML",
    )


def _refuse_unknown(tree: Mapping, known: Collection[str], path: str) -> None:
    for key in tree:
        if key not in known:
            where = f"{path}.{key}" if path else str(key)
            elsewhere = pointers(where, tree[key])
            hint = "" if elsewhere else did_you_mean(str(key), known) or _elsewhere(str(key))
            valid = f"valid keys{' of ' + path if path else ''}: {', '.join(sorted(known)) or '(it takes none)'}"
            raise UserError(f"unknown key '{where}'{hint}", remedy=elsewhere or valid)


def _elsewhere(key: str) -> str:
    from opentau_train.config.explain import namesakes  # which reads the types that are built here

    others = [f"'{name}'" for name in namesakes(key)]
    return f": did you mean {' or '.join(others)}?" if 0 < len(others) < 4 else ""


REPLACED = {
    "opentau_train.sinks.accelerate.TrackerSink": "choose logger=[wandb], mlflow, trackio or swanlab; in your own YAML "
    "name its class, such as opentau_train.sinks.wandb.WandbSink, and leave out the key tracker",
}
"""Classes of older versions that are no more, with what takes their place."""


def locate(target: Any, path: str) -> Any:
    """The class or function that a `_target_` names. Raises `UserError` where there is none."""
    if isinstance(target, str) and target in REPLACED:
        raise UserError(f"{path}.{TARGET} names '{target}', which is no more", remedy=REPLACED[target])
    module_name, _, name = target.rpartition(".") if isinstance(target, str) else ("", "", "")
    if not module_name or module_name.startswith("."):
        raise _bad_target(path, f"is {target!r}, not a full dotted path")
    try:
        named = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise _bad_target(path, f"names '{target}', which can't be imported: {error}") from error
    if not callable(named):
        raise _bad_target(path, f"names '{target}', which is no class or function")
    return named


def _bad_target(path: str, what: str) -> UserError:
    where = f"{path}.{TARGET}" if path else TARGET
    return UserError(f"{where} {what}", remedy="give the full dotted path of a class that is installed")


def instantiate(tree: Mapping[str, Any], path: str, /, **given: Any) -> Any:
    """Build what `tree[_target_]` names from the tree's other keys, checked against its signature, and `given`
    (what the program itself passes; config may not set it)."""
    target, values = bind(tree, path, given)
    return target(**given, **values)


def bind(
    tree: Mapping[str, Any], path: str, given: Collection[str], others: Collection[str] = ()
) -> tuple[Any, dict[str, Any]]:
    """The target and the converted arguments that `instantiate` would call it with, without calling it: a mistake in
    the model's keys is found before minutes are spent on the data. `given` names what the program passes itself;
    `others`, keys of `path` that the program reads elsewhere and that an error lists with the target's."""
    if TARGET not in tree:
        raise UserError(
            f"{path} has no {TARGET}", remedy=f"choose a file of conf/{path.replace('.', '/')}/, or name a class"
        )
    target = locate(tree[TARGET], path)
    by_name, hints, takes_any = _arguments(target, path)
    known = {n: p for n, p in by_name.items() if n not in given}
    taken = next((n for n in known if n in others), None)
    if taken is not None:
        raise UserError(
            f"'{tree[TARGET]}' has an argument '{taken}', but {path}.{taken} is not its to read",
            where=f"{path}.{TARGET}",
            remedy="give the argument another name",
        )
    options = {k: v for k, v in tree.items() if k != TARGET and k not in others}
    checked = {k: v for k, v in options.items() if k in given or not takes_any}
    _refuse_unknown(checked, [*known, *others], path)
    missing = [n for n, p in known.items() if p.default is p.empty and n not in options]
    if missing:
        raise UserError(f"{path}.{missing[0]} is required but not set", remedy=f"add {path}.{missing[0]}=VALUE")
    values = {}
    for name, value in options.items():
        unset = value is None and name in known and known[name].default is None  # `size: int = None`
        values[name] = None if unset else convert(hints.get(name, Any), value, f"{path}.{name}")
    return target, values


def defaults(target: Any) -> dict[str, tuple[Any, Mapping[str, Any]]]:
    """{argument: (its default, its field's metadata)} of what `target` names, for those that have a default; the
    metadata are empty where it is no dataclass. No arguments where it can't be imported, and where it is of a module
    that nothing has imported yet: a checkpoint's settings, which are looked at so, may name any."""
    module = str(target).rpartition(".")[0]
    if module not in sys.modules and not module.startswith("opentau_train."):
        return {}
    try:
        located = locate(target, TARGET)
    except UserError:
        return {}
    metadata = {f.name: f.metadata for f in dataclasses.fields(located)} if dataclasses.is_dataclass(located) else {}
    parameters = _arguments(located, TARGET)[0].items()
    return {n: (p.default, metadata.get(n, {})) for n, p in parameters if p.default is not p.empty}


def _arguments(target: Any, path: str) -> tuple[dict[str, inspect.Parameter], dict[str, Any], bool]:
    """The arguments that have names, all types, and whether it takes any others. `**options: Annotated[Any, CLASS]`
    are what CLASS takes, which they are passed on to."""
    parameters, hints = inspect.signature(target).parameters.values(), _hints(target, path)
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    rest = next((hints.get(p.name, Any) for p in parameters if p.kind is p.VAR_KEYWORD), None)
    if typing.get_origin(rest) is not Annotated:
        return named, hints, rest is not None
    passed_on, their_hints, takes_any = _arguments(typing.get_args(rest)[1], path)
    return passed_on | named, their_hints | hints, takes_any


def _hints(target: Any, path: str) -> dict[str, Any]:
    try:
        return typing.get_type_hints(target.__init__ if inspect.isclass(target) else target, include_extras=True)
    except NameError as error:
        raise _bad_target(path, f"has a type hint that can't be resolved: {error}") from error
