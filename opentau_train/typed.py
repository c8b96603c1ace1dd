"""From a plain tree (dicts, lists, scalars) to typed, frozen dataclasses and to objects named by `_target_`.

Errors name the key's full path, the nearest valid name and the remedy.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union

from opentau_train.errors import UserError, did_you_mean

TARGET = "_target_"


def build(cls: type, tree: Any, path: str) -> Any:
    """An instance of the dataclass `cls` from the mapping `tree`; `path` is the mapping's place in the config.

    A field called `target` is read from the key `_target_`. Raises `UserError` for an unknown key, a missing
    one, a wrong type, and whatever the class's own `check(path)` finds.
    """
    if not isinstance(tree, Mapping):
        raise _wrong(path or "the configuration", "a mapping of settings", tree)
    hints = typing.get_type_hints(cls)
    fields = {TARGET if f.name == "target" else f.name: f for f in dataclasses.fields(cls)}
    _refuse_unknown(tree, fields, path)
    values = {}
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
    """`value` as the type `hint` says, or `UserError`. Integers pass as floats; nothing else is coerced."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(args, value, path)
    if origin is Literal:
        if value not in args:
            hint_text = did_you_mean(str(value), [str(a) for a in args])
            choices = ", ".join(str(a) for a in args)
            raise UserError(f"{path}={value!r} is not a choice{hint_text}", remedy=f"set {path} to one of: {choices}")
        return value
    if origin is tuple:
        return _convert_tuple(args, value, path)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _wrong(path, "a mapping", value)
        return {str(k): convert(args[1], v, f"{path}.{k}") for k, v in value.items() if v is not None or args[1] is Any}
    if dataclasses.is_dataclass(hint):
        return build(hint, value, path)
    return _convert_scalar(hint, value, path)


def _convert_union(args: tuple, value: Any, path: str) -> Any:
    if value is None:
        if type(None) in args:
            return None
        raise _wrong(path, " or ".join(_name(a) for a in args), value)
    options = [a for a in args if a is not type(None)]
    for option in options[:-1]:
        try:
            return convert(option, value, path)
        except UserError:
            continue
    return convert(options[-1], value, path)


def _convert_tuple(args: tuple, value: Any, path: str) -> tuple:
    if isinstance(value, str | Mapping) or not hasattr(value, "__iter__"):
        raise _wrong(path, "a list", value)
    items = list(value)
    if args[-1] is Ellipsis:
        return tuple(convert(args[0], item, f"{path}[{i}]") for i, item in enumerate(items))
    if len(items) != len(args):
        raise _wrong(path, f"a list of {len(args)} values", value)
    return tuple(convert(a, item, f"{path}[{i}]") for i, (a, item) in enumerate(zip(args, items, strict=True)))


def _convert_scalar(hint: type, value: Any, path: str) -> Any:
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if value != value:
            raise _wrong(path, "a number", value)
        return float(value)
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise _wrong(path, _name(hint), value)


_NAMES = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}


def _name(hint: Any) -> str:
    return _NAMES.get(hint, "null" if hint is type(None) else str(hint))


def _wrong(path: str, expected: str, value: Any) -> UserError:
    return UserError(
        f"{path} must be {expected}, got {value!r} ({type(value).__name__})", remedy=f"change {path} on the command line or in its YAML"
    )


def _refuse_unknown(tree: Mapping, known: Mapping, path: str) -> None:
    for key in tree:
        if key not in known:
            where = f"{path}.{key}" if path else str(key)
            raise UserError(
                f"unknown key '{where}'{did_you_mean(str(key), known)}",
                remedy=f"valid keys{' of ' + path if path else ''}: {', '.join(sorted(known))}",
            )


def locate(target: str, path: str) -> Any:
    """The class or function that a `_target_` names."""
    module_name, _, name = target.rpartition(".")
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"{path}.{TARGET} names '{target}', which can't be imported: {error}",
            remedy="give the full dotted path of a class that is installed",
        ) from error


def instantiate(tree: Mapping[str, Any], path: str, **given: Any) -> Any:
    """Build what `tree[_target_]` names from the tree's other keys, checked against its signature, and `given`
    (what the program itself passes; config may not set it)."""
    if TARGET not in tree:
        raise UserError(f"{path} has no {TARGET}", remedy=f"choose a file of conf/{path.replace('.', '/')}/, or name a class")
    target = locate(tree[TARGET], path)
    signature = inspect.signature(target)
    hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    known = {n: p for n, p in signature.parameters.items() if n not in given and p.kind is not p.VAR_KEYWORD}
    options = {k: v for k, v in tree.items() if k != TARGET}
    if not any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
        _refuse_unknown(options, known, path)
    values = {}
    for name, value in options.items():
        hint = hints.get(name, Any)
        values[name] = convert(hint, value, f"{path}.{name}")
    missing = [n for n, p in known.items() if p.default is p.empty and n not in values]
    if missing:
        raise UserError(f"{path}.{missing[0]} is required but not set", remedy=f"add {path}.{missing[0]}=VALUE")
    return target(**given, **values)
