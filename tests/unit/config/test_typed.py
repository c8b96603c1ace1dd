"""From plain trees to typed settings: what fits is kept as it is, what doesn't is answered with its full path."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opentau_train import cli
from opentau_train.config.bounds import at_least, positive
from opentau_train.config.data import SourceSettings
from opentau_train.config.settings import Settings, TrainerSettings, load_settings
from opentau_train.config.typed import build, convert, defaults, instantiate, locate
from opentau_train.data.lerobot import LeRobotSource
from opentau_train.errors import UserError

HERE = __name__


@dataclass(frozen=True)
class Inner:
    size: int
    scale: float = 1.0

    def check(self, path: str) -> None:
        if self.size < 0:
            raise UserError(f"{path}.size must not be negative")


@dataclass(frozen=True)
class Outer:
    inner: Inner
    target: str = field(default="a.b", metadata={"key": "_target_"})
    inners: dict[str, Inner] = field(default_factory=dict)
    pair: tuple[int, int] = (1, 2)
    names: tuple[str, ...] = ()
    columns: dict[str, str] | tuple[str, ...] | None = None
    optional: int | None = None
    choice: Literal["no", "bf16"] = "no"
    flag: bool = False
    free: dict[str, Any] = field(default_factory=dict)

    def check(self, path: str) -> None: ...


def refused(call, *texts: str) -> UserError:
    """The `UserError` that `call` raises; it has a remedy, and `texts` stand in it."""
    with pytest.raises(UserError) as caught:
        call()
    assert caught.value.remedy
    for text in texts:
        assert text in str(caught.value)
    return caught.value


def outer(**tree: Any) -> Outer:
    return build(Outer, {"inner": {"size": 3}} | tree, "")


def test_what_fits_is_kept_and_the_rest_is_default():
    made = outer(
        _target_="x.y",
        inners={"a": {"size": 1, "scale": 2}},
        pair=[3, 4],
        names=["a", "b"],
        choice="bf16",
        optional=None,
        free={"anything": [None, {"x": 1}]},
    )
    assert made.inner == Inner(3)
    assert made.target == "x.y"
    assert made.inners == {"a": Inner(1, 2.0)} and isinstance(made.inners["a"].scale, float)
    assert (made.pair, made.names, made.choice, made.optional) == ((3, 4), ("a", "b"), "bf16", None)
    assert made.free == {"anything": [None, {"x": 1}]}
    assert (made.flag, made.columns) == (False, None)


def test_a_null_entry_of_a_mapping_is_left_out():
    assert outer(inners={"a": None, "b": {"size": 1}}).inners == {"b": Inner(1)}
    assert outer(free={"a": None}).free == {"a": None}  # unless the entries may be anything


@pytest.mark.parametrize(
    ("tree", "texts"),
    [
        ({"inner": {"size": 3, "scal": 2}}, ["inner.scal", "did you mean 'scale'?", "size"]),
        ({"chioce": "no"}, ["unknown key 'chioce'", "did you mean 'choice'?"]),
        ({"target": "x.y"}, ["unknown key 'target'", "did you mean '_target_'?"]),
        ({"inner": {}}, ["inner.size is required", "inner.size=VALUE"]),
        ({"inner": None}, ["inner must be a mapping"]),
        ({"inner": {"size": "3"}}, ["inner.size must be an integer", "'3' (str)"]),
        ({"inner": {"size": 3.0}}, ["inner.size must be an integer", "3.0 (float)"]),
        ({"inner": {"size": True}}, ["inner.size must be an integer", "True (bool)"]),
        ({"inner": {"size": None}}, ["inner.size must be an integer", "None"]),
        ({"inner": {"size": 1, "scale": "1"}}, ["inner.scale must be a number"]),
        ({"inner": {"size": 1, "scale": True}}, ["inner.scale must be a number"]),
        ({"inner": {"size": 1, "scale": math.nan}}, ["inner.scale must be a number"]),
        ({"inner": {"size": 1, "scale": 10**400}}, ["inner.scale must be a number"]),
        ({"inners": {"a": {"size": "x"}}}, ["inners.a.size must be an integer"]),
        ({"inners": [1]}, ["inners must be a mapping"]),
        ({"pair": [1]}, ["pair must be a list of 2 values"]),
        ({"pair": [1, "x"]}, ["pair[1] must be an integer"]),
        ({"names": "abc"}, ["names must be a list"]),
        ({"names": {"a": 1}}, ["names must be a list"]),
        ({"names": 3}, ["names must be a list"]),
        ({"names": ["a", 3]}, ["names[1] must be a string"]),
        ({"columns": 3}, ["columns must be a mapping or a list or null, got 3"]),
        ({"columns": {"wrist": 3}}, ["columns.wrist must be a string, got 3"]),
        ({"columns": ["a", 3]}, ["columns[1] must be a string, got 3"]),
        ({"optional": "x"}, ["optional must be an integer"]),
        ({"flag": 1}, ["flag must be true or false"]),
        ({"flag": "true"}, ["flag must be true or false"]),
        ({"choice": "bf61"}, ["choice='bf61'", "did you mean 'bf16'?", "one of: no, bf16"]),
        ({"choice": False}, ["choice=False", "in quotes", "no"]),
        ({"choice": ["no"]}, ["is not a choice"]),
        ({"inner": {"size": -1}}, []),
    ],
    ids=str,
)
def test_a_mistake_is_answered_with_path_and_remedy(tree, texts):
    if not texts:
        with pytest.raises(UserError, match=r"inner\.size must not be negative"):
            outer(**tree)
        return
    refused(lambda: outer(**tree), *texts)


def test_a_tree_that_is_no_mapping_is_refused():
    refused(lambda: build(Outer, [1], ""), "the configuration must be a mapping")


def test_the_path_of_the_whole_tree_leads_every_message():
    refused(lambda: build(Outer, {"inner": {"size": "x"}}, "data.sources.a"), "data.sources.a.inner.size must")
    refused(lambda: build(Outer, {}, "data"), "data.inner is required")


def test_a_hint_may_bound_its_value():
    even_less = Annotated[int | None, positive, lambda path, value: at_least(path, value, 3)]
    assert convert(even_less, 3, "x") == 3 and convert(even_less, None, "x") is None
    refused(lambda: convert(even_less, 0, "x"), "x must be greater than 0, got 0")
    refused(lambda: convert(even_less, 2, "x"), "x must be at least 3, got 2")
    refused(lambda: convert(even_less, "3", "x"), "x must be an integer, got '3'")
    refused(lambda: instantiate({"_target_": f"{HERE}.bounded", "size": -1}, "model"), "model.size must be greater")


def test_equal_values_of_another_type_are_no_choice():
    assert convert(Literal[1, 2], 1, "x") == 1
    refused(lambda: convert(Literal[1, 2], True, "x"), "x=True")
    refused(lambda: convert(Literal[1, 2], 1.0, "x"), "x=1.0")


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
TREES = st.recursive(
    SCALARS,
    lambda leaf: st.lists(leaf, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), leaf, max_size=3),
    max_leaves=8,
)
HINTS = st.sampled_from(
    [
        *(int, float, str, bool, int | None, float | None, int | str, Any, Inner, Literal["a", 1, True], list[int]),
        *(tuple[int, int], tuple[str, ...], dict[str, int], dict[str, Any], dict[str, str] | tuple[str, ...] | None),
        *(dict[str, dict[str, Any]], Sequence[float], typing.Optional[tuple[float, float]]),  # noqa: UP045 (both forms)
    ]
)


def fits(hint: Any, value: Any) -> bool:
    """Whether `value` has the type `hint`, decided without the code under test."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if type(None) in args or origin is type(int | str):
        return any(value is None if a is type(None) else fits(a, value) for a in args)
    if origin is Literal:
        return any(type(value) is type(a) and value == a for a in args)
    if origin is tuple and args[-1] is not Ellipsis:
        return isinstance(value, tuple) and len(value) == len(args) and all(map(fits, args, value))
    if origin in (tuple, list, Sequence):
        return type(value) is (tuple if origin is tuple else list) and all(fits(args[0], v) for v in value)
    if origin is dict:
        return type(value) is dict and all(isinstance(k, str) and fits(args[1], v) for k, v in value.items())
    return type(value) is hint and value == value


@given(HINTS, TREES)
def test_any_value_is_converted_to_its_type_or_refused_with_its_path(hint, tree):
    try:
        made = convert(hint, tree, "some.key")
    except UserError as error:
        assert error.what.startswith(("some.key", "unknown key 'some.key."))
        assert error.remedy or "negative" in error.what
    else:
        assert fits(hint, made)
        if not isinstance(made, Inner):
            assert fits(hint, convert(hint, made, "some.key"))  # what is converted once passes as it is


@given(TREES.filter(lambda tree: isinstance(tree, Mapping)))
def test_any_tree_gives_settings_or_a_user_error(tree):
    with pytest.raises(UserError):  # none of them has the required keys
        load_settings(tree)


# ---------------------------------------------------------------- instantiate


class Thing:
    # scale's hint leaves None out, as those of many libraries do
    def __init__(self, size: int, *args: int, names: tuple[str, ...] = (), scale: float = None, context: str = ""):  # noqa: RUF013
        self.size, self.names, self.scale, self.context = size, names, scale, context


class Open:
    def __init__(self, path: str = "", **rest: Any):
        self.path, self.rest = path, rest


class Empty:
    pass


def bounded(size: Annotated[int, positive] = 1) -> int:
    return size


class Unresolved:
    def __init__(self, size: Nowhere = 1): ...  # noqa: F821 (that is the point)


def make(number: int = 1) -> list[int]:
    return [number]


CONSTANT = 3


def test_a_target_is_built_from_the_tree_and_what_the_program_gives():
    tree = {"_target_": f"{HERE}.Thing", "size": 3, "names": ["a"]}
    made = instantiate(tree, "model", context="given")
    assert (made.size, made.names, made.scale, made.context) == (3, ("a",), None, "given")
    assert tree == {"_target_": f"{HERE}.Thing", "size": 3, "names": ["a"]}


def test_functions_and_bare_classes_are_targets_too():
    assert instantiate({"_target_": f"{HERE}.make", "number": 2}, "model") == [2]
    assert isinstance(instantiate({"_target_": f"{HERE}.Empty"}, "model"), Empty)


def test_null_is_allowed_where_it_is_the_default():
    assert instantiate({"_target_": f"{HERE}.Thing", "size": 1, "scale": None}, "model").scale is None
    refused(lambda: instantiate({"_target_": f"{HERE}.Thing", "size": None}, "model"), "model.size must be an integer")


def test_a_program_may_give_what_instantiate_itself_calls_path():
    made = instantiate({"_target_": f"{HERE}.Open", "more": [1]}, "logger.x", path="here")
    assert (made.path, made.rest) == ("here", {"more": [1]})


@pytest.mark.parametrize(
    ("tree", "texts"),
    [
        ({}, ["model has no _target_", "conf/model/"]),
        ({"_target_": None}, ["model._target_ is None", "full dotted path"]),
        ({"_target_": 5}, ["model._target_ is 5"]),
        ({"_target_": "Thing"}, ["model._target_ is 'Thing'"]),
        ({"_target_": "..a.Thing"}, ["model._target_ is '..a.Thing'"]),
        ({"_target_": "no.such.Thing"}, ["'no.such.Thing'", "can't be imported"]),
        ({"_target_": f"{HERE}.Thign"}, ["Thign", "can't be imported"]),
        ({"_target_": f"{HERE}.CONSTANT"}, ["no class or function"]),
        ({"_target_": f"{HERE}.Unresolved"}, ["type hint", "Nowhere"]),
        ({"_target_": f"{HERE}.Thing"}, ["model.size is required", "model.size=VALUE"]),
        ({"_target_": f"{HERE}.Thing", "size": "x"}, ["model.size must be an integer"]),
        ({"_target_": f"{HERE}.Thing", "size": 1, "nmaes": []}, ["unknown key 'model.nmaes'", "did you mean 'names'?"]),
        ({"_target_": f"{HERE}.Thing", "size": 1, "args": [1]}, ["unknown key 'model.args'"]),
        ({"_target_": f"{HERE}.Thing", "size": 1, "context": "mine"}, ["unknown key 'model.context'"]),
        ({"_target_": f"{HERE}.Open", "context": "mine"}, ["unknown key 'model.context'"]),
    ],
    ids=str,
)
def test_a_wrong_target_is_answered_with_its_path(tree, texts):
    refused(lambda: instantiate(tree, "model", context="given"), *texts)


@pytest.mark.parametrize(("key", "meant"), [("lr", "'optimizer.lr'"), ("betas", "'optimizer.betas'"), ("zzz", "")])
def test_a_key_of_another_section_is_pointed_to_by_its_whole_name(key, meant):
    with pytest.raises(UserError) as refusal:
        build(TrainerSettings, {key: 1}, "trainer")
    assert refusal.value.what == f"unknown key 'trainer.{key}'" + (f": did you mean {meant}?" if meant else "")


def test_an_error_inside_a_target_is_not_the_users_mistake(monkeypatch):
    def broken() -> None:
        raise TypeError("of its own")

    monkeypatch.setattr(sys.modules[HERE], "make", broken)
    with pytest.raises(TypeError, match="of its own"):
        instantiate({"_target_": f"{HERE}.make"}, "model")


def test_locate_finds_what_a_dotted_path_names():
    assert locate("opentau_train.errors.UserError", "x") is UserError


# ---------------------------------------------------------------- the settings themselves

MINIMAL = {
    "data": {"sources": {"main": {"root": "somewhere"}}},
    "model": {"_target_": "a.B"},
    "trainer": {"steps": 1, "global_batch_size": 4},
    "optimizer": {"lr": 1e-3},
    "scheduler": {"_target_": "a.C"},
    "validation": {},
    "checkpoint": {},
    "parallelism": {},
    "paths": {},
    "logger": {},
}


def settings(changes: Mapping[str, Any]) -> Settings:
    """The minimal settings with `changes` {dotted key: value}."""
    tree: dict[str, Any] = {k: dict(v) for k, v in MINIMAL.items()}
    tree["data"] = {"sources": {"main": {"root": "somewhere"}}}
    for key, value in changes.items():
        *folders, last = key.split(".")
        node = tree
        for name in folders:
            node = node.setdefault(name, {})
        node[last] = value
    return load_settings(tree)


def test_the_minimal_settings_hold_and_cannot_be_changed():
    made = settings({})
    assert made.data.sources["main"].root == "somewhere"
    assert made.seed == 0 and made.resume.checkpoint == "never"
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.trainer.steps = 2


@pytest.mark.parametrize("key", MINIMAL)
def test_every_group_is_required(key):
    refused(lambda: load_settings({k: v for k, v in MINIMAL.items() if k != key}), f"{key} is required")


@pytest.mark.parametrize("sources", [{}, {"main": None}])
def test_a_mixture_without_a_dataset_is_refused(sources):
    refused(lambda: settings({"data.sources": sources}), "no dataset is configured", "data.sources", "+recipe=")


@pytest.mark.parametrize(
    ("key", "bad", "good"),
    [
        ("data.sources.main.weight", -0.5, 0.0),
        ("data.sources.main.weight", -1, 3),
        ("data.sources.main.val_split_ratio", 1.1, 1.0),
        ("data.sources.main.val_split_ratio", -0.1, 0.99),
        ("data.sources.main.chunk_length", 0, 1),
        ("data.sources.main.tolerance_s", 0.0, 1e-9),
        ("data.sources.main.filter_rule", "end", "whole"),
        ("data.builtin_sample", "droids", "droid"),
        ("data.image_size", [7, 96], [8, 8]),
        ("data.image_size", [96], [96, 128]),
        ("data.chunk_length", 0, 1),
        ("data.history", -1, 0),
        ("data.num_workers", -1, 0),
        ("data.prefetch_factor", 0, 1),
        ("data.lanes_per_sample", 0, 1),
        ("data.phase_rows", 0, 1),
        ("data.max_samples_per_batch", 0, None),
        ("data.normalization", "mean", "quantiles"),
        ("data.dropout.prompt", 1.0, 0.0),
        ("data.dropout.camera", -0.5, 0.5),
        ("data.bad_samples.max_fraction", 1.0, 0.0),
        ("data.bad_samples.grace", -1, 0),
        ("trainer.steps", 0, 1),
        ("trainer.global_batch_size", -4, 4),
        ("trainer.grad_clip", 0.0, None),
        ("trainer.log_every", 0, 1),
        ("trainer.step_timeout", 0, 0.5),
        ("trainer.max_skipped_steps", 0, 1),
        ("trainer.ema_decay", 1.0, 0.999),
        ("trainer.precision", False, "bf16"),
        ("optimizer.lr", 0, 1),
        ("optimizer.weight_decay", -1e-3, 0),
        ("optimizer.groups", {"a": {"pattern": "*", "lr_scale": -1.0}}, {"a": {"pattern": "*", "lr_scale": 0.0}}),
        ("parallelism.data_parallel_replicate_degree", 0, 2),
        ("parallelism.data_parallel_shard_degree", -2, 4),
        ("validation.every", -1, 0),
        ("validation.batch_size", 0, None),
        ("validation.num_noise_draws", 0, 2),
        ("checkpoint.every", -1, 0),
        ("checkpoint.keep_last", 0, None),
    ],
    ids=str,
)
def test_a_value_out_of_range_is_refused_and_the_nearest_good_one_is_not(key, bad, good):
    refused(lambda: settings({key: bad}), key)
    settings({key: good})


def test_a_filter_needs_its_file():
    refused(lambda: settings({"data.sources.main.use_filter_dict": True}), "data.sources.main.filter_dict_path")
    settings({"data.sources.main.use_filter_dict": True, "data.sources.main.filter_dict_path": "keep.json"})


def test_the_cache_of_a_home_directory_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/somebody")
    assert str(settings({"paths.cache_dir": "~/cache"}).paths.cache) == "/somebody/cache"


def test_settings_need_no_torch():
    code = "import sys, opentau_train.config.settings, opentau_train.config.typed; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_source_without_a_file_of_conf_has_the_defaults_that_the_file_shows():
    overrides = ["+recipe=lerobot", "data.sources.main.root=/a", "data.sources.other.root=/a"]
    main, other = (load_settings(cli.compose(overrides)).data.sources[name] for name in ("main", "other"))
    assert dataclasses.replace(main, options={}) == other == SourceSettings(root="/a")
    assert instantiate(main.arguments, "data.sources.main") == LeRobotSource()


class Base:
    def __init__(self, spec: Any, *, size: int, ratio: Annotated[float, positive] = 1.0, label: str = "base"):
        self.size, self.ratio, self.label = size, ratio, label


class PassesOn(Base):
    def __init__(self, spec: Any, *, depth: int = 2, label: str = "own", **others: Annotated[Any, Base]):
        super().__init__(spec, label=label, **others)
        self.depth = depth


def test_options_that_a_class_passes_on_are_checked_as_the_other_class_s_own():
    tree = {"_target_": f"{HERE}.PassesOn", "size": 3, "ratio": 2}
    made = instantiate(tree, "model", spec=None)
    assert (made.size, made.ratio, made.label, made.depth) == (3, 2.0, "own", 2) and type(made.ratio) is float
    refused(
        lambda: instantiate({**tree, "sice": 3}, "model", spec=None), "unknown key 'model.sice'", "did you mean 'size'"
    )
    refused(lambda: instantiate({**tree, "ratio": -1.0}, "model", spec=None), "model.ratio must be greater than 0")
    refused(
        lambda: instantiate({"_target_": tree["_target_"]}, "model", spec=None), "model.size is required but not set"
    )
    assert {name: default for name, (default, _) in defaults(tree["_target_"]).items()} == {
        "depth": 2,
        "label": "own",
        "ratio": 1.0,
    }
