"""Conventions of whole sources: statistics over chunks, shared norm heads, what a checkpoint keeps and gives back."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml

from opentau_train.checkpoints.card import read_card
from opentau_train.checkpoints.pretrained import load_policy
from opentau_train.config import typed
from opentau_train.data.convention import Convention
from opentau_train.data.conventions.sources import check_agreement, record, recorded_difference
from opentau_train.data.conventions.steps import conversions
from opentau_train.data.load.samples import SampleBuilder
from opentau_train.data.mixture.mixture import Mixture
from opentau_train.deploy import policy as deploy
from opentau_train.errors import UserError
from opentau_train.types import Address
from opentau_train.validation.actions import dimensions
from tests.lerobot_writer import Dataset, write
from tests.program import REPO, TINY_POLICY, metrics, train_here
from tests.rotation_formulas import angle_between, matrices, some
from tests.unit.data.mixture.test_statistics import mixture

LENGTHS = (11, 7, 13, 4)
CHUNK = 6
ARM = [
    {"kind": "joint", "dims": 2, "unit": "rad", "reference": "absolute"},
    {"kind": "gripper", "polarity": "closed", "range": [0, 1], "reference": "absolute"},
]
HAND = [
    {"kind": "position", "unit": "m", "reference": "absolute"},
    {"kind": "rotation", "rotation": "euler_xyz", "unit": "rad", "reference": "absolute"},
    {"kind": "gripper", "polarity": "closed", "range": [0, 1], "reference": "absolute"},
]
FROM_RAD = np.array([180 / np.pi, 180 / np.pi, 1.0], np.float32)
DELTA_JOINTS = [{"kind": "joint", "reference": "delta_start"}, {"kind": "gripper"}]
DELTA_HAND = [
    {"kind": "position", "reference": "delta_start"},
    {"kind": "rotation", "rotation": "rot6d", "reference": "delta_start"},
    {"kind": "gripper", "polarity": "open", "range": [-1, 1]},
]


def said(key: str, parts: list[dict]) -> str:
    """An override that sets `key` to a list of parts."""
    return f"{key}={json.dumps(parts).replace(chr(34), '')}"


def declare(name: str, parts: list[dict]) -> list[str]:
    return [said(f"data.sources.{name}.convention.{vector}", parts) for vector in ("actions", "state")]


def arm(seed: int, scale: float = 1.0, joints: int = 2) -> dict[str, list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    size = np.array([scale] * joints + [1.0])

    def rows(n: int) -> np.ndarray:
        return (rng.uniform(0, 1, (n, joints + 1)) * size).astype(np.float32)

    return {name: [rows(n) for n in LENGTHS] for name in ("state", "action")}


def hand(seed: int) -> dict[str, list[np.ndarray]]:
    rng = np.random.default_rng(seed)

    def rows(n: int) -> np.ndarray:
        grip = rng.uniform(0, 1, (n, 1))
        return np.concatenate([rng.normal(size=(n, 3)), some(rng, (n,), "euler_xyz"), grip], axis=1).astype(np.float32)

    return {name: [rows(n) for n in LENGTHS] for name in ("state", "action")}


def stored(root, rows: dict[str, list[np.ndarray]], **changes):
    columns = {
        column: (
            {"dtype": "float32", "shape": [rows[name][0].shape[1]], "names": None},
            lambda e, f, of=rows[name]: of[e][f].tolist(),
        )
        for column, name in (("observation.state", "state"), ("action", "action"))
    }
    return write(root, Dataset(lengths=LENGTHS, cameras={}, columns=columns, **changes))


@pytest.fixture
def opened(tmp_path):
    def of(rows, parts, *overrides: str) -> Mixture:
        root = stored(tmp_path / "set", rows)
        given = [
            f"data.sources.main.root={root}",
            f"data.chunk_length={CHUNK}",
            "data.sources.main.val_split_ratio=0.0",
        ]
        return mixture(tmp_path, *given, *declare("main", parts), *overrides)

    return of


def deltas(rows, moving: int) -> list[np.ndarray]:
    """[n, A] f64 of each step of a chunk: all the rows' chunks, without what is after the episode's end."""
    mask = np.arange(rows["action"][0].shape[1]) < moving
    pairs = list(zip(rows["state"], rows["action"], strict=True))
    return [
        np.concatenate(
            [a[k:].astype(float) - np.where(mask, s[: len(a) - k], 0.0) if k < len(a) else a[:0] for s, a in pairs]
        )
        for k in range(CHUNK)
    ]


def assert_moments(found, rows: np.ndarray) -> None:
    np.testing.assert_allclose(found.mean, rows.mean(0), atol=1e-6)
    np.testing.assert_allclose(found.std, rows.std(0), atol=1e-6)
    np.testing.assert_allclose(found.min, rows.min(0), atol=1e-6)
    np.testing.assert_allclose(found.q01, np.quantile(rows, 0.01, axis=0), atol=1e-6)
    np.testing.assert_allclose(found.q99, np.quantile(rows, 0.99, axis=0), atol=1e-6)


def test_statistics_of_deltas_are_of_all_chunks_without_what_is_after_the_end(opened, monkeypatch):
    monkeypatch.setattr("opentau_train.data.mixture.mixture._WINDOWS_AT_ONCE", 5)
    rows = arm(0)
    stats = opened(rows, ARM, said("data.convention.actions", DELTA_JOINTS)).stats["arm::default"]
    every = np.concatenate(deltas(rows, 2))
    assert stats.actions.count == len(every) == sum(max(0, n - k) for n in LENGTHS for k in range(CHUNK))
    assert_moments(stats.actions, every)
    assert stats.state.count == sum(LENGTHS)
    assert_moments(stats.state, np.concatenate(rows["state"]).astype(float))


def test_each_step_of_the_chunk_may_have_statistics_of_its_own(opened):
    rows = arm(0)
    per_step = "data.normalization_per_timestep=true"
    made = opened(rows, ARM, said("data.convention.actions", DELTA_JOINTS), per_step)
    found = made.stats["arm::default"].actions
    assert found.mean.shape == (CHUNK, 3)
    for k, of_step in enumerate(deltas(rows, 2)):
        step = {n: getattr(found, n)[k] for n in ("mean", "std", "min", "max", "q01", "q99")}
        assert_moments(type(found)(count=0, **step), of_step)
    chunks = np.stack([make(made, e, f)["actions"] for e, n in enumerate(LENGTHS) for f in range(n - CHUNK + 1)])
    whole = np.stack([a[k : k + CHUNK] for a in rows["action"] for k in range(len(a) - CHUNK + 1)])
    assert chunks.shape == whole.shape and np.abs(chunks.mean(0)).max() < 0.6 and chunks.std(0).min() > 0.5


def make(made: Mixture, episode: int, frame: int) -> dict:
    builder = SampleBuilder(made, training=True)
    sample = dict(builder.build(0, Address(0, episode, frame, 0)))
    builder.close()
    return sample


def test_a_declaration_alone_changes_nothing(opened, tmp_path):
    rows = arm(1)
    declared = opened(rows, ARM)
    plain = mixture(tmp_path, f"data.sources.main.root={tmp_path / 'set'}", f"data.chunk_length={CHUNK}")
    assert declared.datasets[0].transforms == {} and declared.spec == plain.spec
    one, other = (make(m, 0, 3) for m in (declared, plain))
    assert one.keys() == other.keys()
    assert_moments(declared.stats["arm::default"].actions, np.concatenate(rows["action"]).astype(float))


@pytest.mark.slow
@pytest.mark.parametrize("normalization", ["mean_std", "quantiles"])
@pytest.mark.parametrize("per_step", ["false", "true"])
def test_an_oracle_on_every_window_gives_back_the_datasets_own_poses(opened, normalization, per_step):
    rows = hand(0)
    wanted = [said("data.convention.actions", DELTA_HAND), f"data.normalization={normalization}"]
    made = opened(rows, HAND, *wanted, f"data.normalization_per_timestep={per_step}", "data.action_dim=12")
    assert made.spec.action_dim == 12 and made.stats["arm::default"].action_names[3] == "rotation.rot6d[0]"
    for e, n in enumerate(LENGTHS):
        for f in range(n):
            sample = make(made, e, f)
            found = made.pipelines[0].units(sample["actions"], "arm::default", state=sample["state"])
            valid = ~sample["action_is_pad"]
            true = rows["action"][e][f : f + CHUNK]
            assert found.shape == (CHUNK, 7) and valid.sum() == len(true)
            found = found[valid]
            np.testing.assert_allclose(found[:, [0, 1, 2, 6]], true[:, [0, 1, 2, 6]], atol=1e-5)
            turns = [matrices(x[:, 3:6], "euler_xyz") for x in (found, true)]
            assert angle_between(*turns).max() < 1e-5


def test_the_tags_of_errors_are_of_the_robots_dimensions_and_units(opened):
    parts = [{**HAND[0], "unit": "mm"}, HAND[1], HAND[2]]
    made = opened(hand(0), parts, said("data.convention.actions", [{**DELTA_HAND[2]}, *DELTA_HAND[:2]]))
    dims = dimensions(made, made.groups[0])
    assert [d.unit for d in dims] == ["mm"] * 3 + ["rad"] * 3 + ["gripper"]
    assert dims[6].middle == pytest.approx(0.5, abs=0.05)


def test_the_examples_of_the_docs_convert_droid(tmp_path):
    text = (REPO / "docs" / "data.md").read_text().partition("## Action and state conventions")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```yaml\n(.*?)^```", text, flags=re.S | re.M)
    expected = [("joint", 8, [7, 1]), ("ee", 10, [3, 6, 1])]
    for block, rows, (space, dims, widths) in zip(blocks, (arm(0, joints=7), hand(0)), expected, strict=True):
        tree = yaml.safe_load(block)["data"]
        root = stored(tmp_path / space, rows)
        overrides = [f"data.sources.droid.root={root}", "~data.sources.main", f"data.chunk_length={CHUNK}"]
        for vector, parts in tree["sources"]["droid"]["convention"].items():
            overrides.append(said(f"data.sources.droid.convention.{vector}", parts))
        for vector, parts in tree["convention"].items():
            overrides.append(said(f"data.convention.{vector}", parts))
        per_step = str(tree.get("normalization_per_timestep", False)).lower()
        made = mixture(tmp_path, *overrides, f"data.normalization_per_timestep={per_step}")
        trained = made.datasets[0].conversions.convention
        assert (trained.space, made.spec.action_dim, [p.dims for p in trained.actions]) == (space, dims, widths)
        sample = make(made, 0, 0)
        found = made.pipelines[0].units(sample["actions"], "arm::default", state=sample["state"])
        assert found.shape == (CHUNK, rows["action"][0].shape[1])
        np.testing.assert_allclose(found[:, -1], rows["action"][0][:CHUNK, -1], atol=1e-5)


def test_a_checkpoint_of_converted_actions_is_not_validated_on_others(opened):
    rows = arm(0)
    converted = opened(rows, ARM, said("data.convention.actions", DELTA_JOINTS)).datasets[0].conversions
    undeclared, declared = replace(converted, parts={"actions": (), "state": ()}, transforms={}), opened(rows, ARM)
    entry = json.loads(json.dumps(record([converted])))["main"]
    assert recorded_difference(converted, entry) is None
    assert "mean something else: reference of dimension 0 is delta_start and absolute" in str(
        recorded_difference(declared.datasets[0].conversions, entry)
    )
    assert "was trained on actions of data.convention" in str(recorded_difference(undeclared, entry))
    assert "as its dataset has them" in str(recorded_difference(converted, None))
    assert recorded_difference(declared.datasets[0].conversions, None) is None
    assert record([undeclared, replace(undeclared, declared=type(converted.declared)())]).keys() == {"main"}


TWO = ["~data.sources.main", f"data.chunk_length={CHUNK}"]


def two(tmp_path, one: list[dict], other: list[dict], *overrides: str, **changes) -> Mixture:
    roots = [stored(tmp_path / "a", arm(0)), stored(tmp_path / "b", arm(2, 180 / np.pi), **changes)]
    given = [f"data.sources.{name}.root={root}" for name, root in zip("ab", roots, strict=True)]
    return mixture(tmp_path, *given, *TWO, *declare("a", one), *declare("b", other), *overrides)


DEGREES = [{**ARM[0], "unit": "deg"}, ARM[1]]


def test_sources_of_a_norm_head_must_mean_the_same(tmp_path):
    with pytest.raises(UserError, match=r"'a' and 'b' share norm head arm::default.* unit of dimension 0") as caught:
        two(tmp_path, ARM, DEGREES)
    assert "data.convention.actions" in caught.value.remedy and "robot_type" in caught.value.remedy
    wanted = [{"kind": "joint", "unit": "rad"}, {"kind": "gripper"}]
    both = [said(f"data.convention.{vector}", wanted) for vector in ("actions", "state")]
    pooled = two(tmp_path, ARM, DEGREES, *both)
    assert pooled.stats["arm::default"].actions.max[0] < 1.1
    apart = two(tmp_path, ARM, DEGREES, "data.sources.b.robot_type=other")
    assert len(apart.stats) == 2
    unknown = two(tmp_path, ARM, [{"kind": "other", "dims": 3, "unit": "none"}], "data.sources.b.robot_type=other")
    assert len(unknown.stats) == 2


@pytest.mark.parametrize(
    ("facet", "one", "other"),
    [
        ("kind", {"kind": "joint", "dims": 3}, {"kind": "position"}),
        ("unit", {"kind": "joint", "dims": 3, "unit": "m"}, {"kind": "joint", "dims": 3, "unit": "rad"}),
        ("rotation", *({"kind": "rotation", "rotation": r} for r in ("euler_xyz", "euler_zyx"))),
        ("reference", *({"kind": "joint", "dims": 3, "reference": r} for r in ("absolute", "delta_step"))),
        ("frame", *({"kind": "position", "reference": "delta_step", "frame": f} for f in ("base", "tool"))),
        ("polarity", *({"kind": "gripper", "dims": 3, "polarity": p} for p in ("open", "closed"))),
        ("range", *({"kind": "gripper", "dims": 3, "range": r} for r in ((0, 1), (0, 100)))),
    ],
)
def test_sources_of_a_norm_head_agree_in_each_part_of_their_conventions(facet, one, other):
    names = tuple(f"action[{i}]" for i in range(3))
    made = [
        conversions(typed.build(Convention, {"actions": [part]}, name), Convention(), (), names, name)
        for part, name in ((one, "a"), (other, "b"))
    ]
    check_agreement("arm::default", made[0], made[0], (30, 30))
    with pytest.raises(UserError, match=rf"'a' and 'b' share norm head arm::default.* {facet} of dimension 0"):
        check_agreement("arm::default", *made, (30, 30))


def test_chunks_of_two_rates_in_one_norm_head_are_told(tmp_path, caplog):
    two(tmp_path, ARM, ARM, fps=10)
    assert "steps of their chunks are 30 and 10 to a second: set data.sources.b.fps=30, or" in caplog.text


@pytest.mark.slow
def test_a_policy_of_two_conventions_is_told_which_one_the_robot_speaks(tmp_path):
    wanted = [{"kind": "joint", "unit": "rad"}, {"kind": "gripper"}]
    roots = [stored(tmp_path / "a", arm(0)), stored(tmp_path / "b", arm(2, 180 / np.pi))]
    given = [f"data.sources.{name}.root={root}" for name, root in zip("ab", roots, strict=True)]
    given += [*declare("a", ARM), *declare("b", DEGREES)]
    given += [said(f"data.convention.{vector}", wanted) for vector in ("actions", "state")]
    small = ["data.num_workers=0", "trainer.global_batch_size=4", "trainer.steps=1", "scheduler.warmup_steps=0"]
    loaded = load_policy(train_here(["+recipe=lerobot", *given, *TWO, *TINY_POLICY, *small], tmp_path / "run"))
    head, state = "arm::default", np.full(3, 0.5, np.float32)
    with pytest.raises(
        UserError, match="'a' and 'b' share norm head 'arm::default', and aren't converted alike"
    ) as error:
        loaded.observe([{"state": state}], head)
    assert "dataset='a'" in error.value.remedy
    a, b = (loaded.observe([{"state": s}], head, dataset=d) for s, d in ((state, "a"), (state * FROM_RAD, "b")))
    torch.testing.assert_close(a.state, b.state)
    chunk = torch.zeros(1, CHUNK, loaded.spec.action_dim)
    with pytest.raises(UserError, match="aren't converted alike"):
        loaded.units(chunk, a)
    with pytest.raises(UserError, match="has no dataset 'c'"):
        loaded.units(chunk, a, dataset="c")
    radians, degrees = (loaded.units(chunk, a, dataset=name) for name in ("a", "b"))
    np.testing.assert_allclose(radians * FROM_RAD, degrees, rtol=1e-5)
    run = tmp_path / "run"
    with pytest.raises(UserError, match="aren't converted alike"):
        deploy.load_policy(run).act({"state": state})
    acts = {d: deploy.load_policy(run, dataset=d).act({"state": s}) for d, s in (("a", state), ("b", state * FROM_RAD))}
    np.testing.assert_allclose(acts["a"] * FROM_RAD, acts["b"], rtol=1e-4)
    with pytest.raises(UserError, match="the policy has no dataset 'c'"):
        deploy.load_policy(run, dataset="c")


def test_deltas_step_by_step_at_two_rates_are_not_the_same(tmp_path):
    steps = [{"kind": "joint", "reference": "delta_step"}, {"kind": "gripper"}]
    with pytest.raises(UserError, match="deltas at different rates: 30 and 10 fps") as caught:
        two(tmp_path, ARM, ARM, said("data.convention.actions", steps), fps=10)
    assert "delta_start" in caught.value.remedy
    two(tmp_path, ARM, ARM, said("data.convention.actions", DELTA_JOINTS), fps=10)


def test_actions_that_go_on_from_row_to_row_are_not_resampled(opened):
    parts = [{**ARM[0], "reference": "delta_step"}, ARM[1]]
    root = opened(arm(0), ARM).datasets[0].settings.root
    actions = said("data.sources.main.convention.actions", parts)
    assert root is not None
    with pytest.raises(UserError, match="can't be taken at 10") as caught:
        opened(arm(0), ARM, actions, "data.sources.main.fps=10")
    assert caught.value.remedy == "leave data.sources.main.fps out"


def test_a_part_that_no_source_has_is_an_error(opened):
    with pytest.raises(UserError, match=r"no source has the part 'hand' of data.convention.actions"):
        opened(arm(0), ARM, said("data.convention.actions", [*DELTA_JOINTS, {"kind": "gripper", "name": "hand"}]))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(the arguments of a training of one step on deltas of poses, its rows, its run directory)."""
    rows, tmp_path = hand(3), tmp_path_factory.mktemp("trained")
    root = stored(tmp_path / "set", rows)
    arguments = ["+recipe=lerobot", f"data.sources.main.root={root}", f"data.chunk_length={CHUNK}", *TINY_POLICY]
    arguments += ["data.sources.main.val_split_ratio=0.3", "data.num_workers=0", "trainer.global_batch_size=4"]
    arguments += ["validation.evaluators=[loss,action]", "trainer.log_every=1", "trainer.steps=1"]
    arguments += [*declare("main", HAND), said("data.convention.actions", DELTA_HAND)]
    arguments += ["data.normalization_per_timestep=true", "scheduler.warmup_steps=0"]
    return arguments, rows, train_here(arguments, tmp_path / "run")


@pytest.mark.slow
def test_a_checkpoint_keeps_the_convention_and_gives_actions_in_the_robots(trained):
    _, rows, run = trained
    loaded = load_policy(run)
    kept = loaded.meta["conventions"]["main"]
    assert kept["converted"] and kept["space"] == "ee" and len(kept["hash"]) == 16
    assert [part["kind"] for part in kept["declared"]["actions"]] == ["position", "rotation", "gripper"]
    assert [part.get("reference") for part in kept["trained"]["actions"]] == ["delta_start", "delta_start", "absolute"]
    head = "arm::default"
    state = rows["state"][2][4]
    batch = loaded.observe([{"state": state}], head)
    true = rows["action"][2][4 : 4 + CHUNK]
    sample = loaded.pipelines[head](
        {"state": state, "actions": true, "action_is_pad": np.zeros(CHUNK, bool), "norm_head": head, "prompts": ()}
        | {"mode": "policy", "images": {}},
        0,
        training=False,
    )
    found = loaded.units(torch.from_numpy(sample["actions"])[None], batch)[0]
    np.testing.assert_allclose(found[:, [0, 1, 2, 6]], true[:, [0, 1, 2, 6]], atol=1e-5)
    assert angle_between(*(matrices(x[:, 3:6], "euler_xyz") for x in (found, true))).max() < 1e-5
    last = metrics(run)[1]
    assert {"MAE_m", "MAE_rad"} <= {tag.rsplit("/")[-1] for tag in last if tag.startswith("Validation-Action/")}


@pytest.mark.slow
def test_a_run_goes_on_in_its_own_convention_only(trained):
    arguments, _, run = trained
    arguments = [*arguments, "trainer.steps=2", "resume=auto"]
    other = said("data.convention.actions", [*DELTA_HAND[:1], {"kind": "rotation"}, {"kind": "gripper"}])
    with pytest.raises(UserError, match=r"data.convention.actions: .*converted otherwise"):
        train_here([*arguments, other], run)
    with pytest.raises(UserError, match=r"data.sources.main.convention.actions: .*converted otherwise"):
        train_here(
            [
                *arguments,
                said("data.sources.main.convention.actions", [*HAND[:1], {**HAND[1], "unit": "deg"}, HAND[2]]),
            ],
            run,
        )
    with pytest.raises(UserError, match=r"data.normalization_per_timestep: True -> False"):
        train_here([*arguments, "data.normalization_per_timestep=false"], run)
    train_here(arguments, run)
    assert read_card(run / "checkpoints" / "last" / "pretrained_model").policy["conventions"]["main"]["converted"]


def test_rotations_of_another_rate_are_turned_where_they_are_declared(opened):
    rows = hand(3)
    unknown = [{"kind": "other", "dims": 7}]
    chunk, of_rows = {}, rows["action"][2]
    for name, parts in (("known", HAND), ("unknown", unknown)):
        made = opened(rows, parts, "data.sources.main.fps=20")
        sample = make(made, 2, 4)
        chunk[name] = made.pipelines[0].units(sample["actions"], "arm::default", state=sample["state"])
    places = np.minimum(4 + np.arange(CHUNK) * 1.5, LENGTHS[2] - 1)
    low, high = of_rows[np.floor(places).astype(int)], of_rows[np.ceil(places).astype(int)]
    np.testing.assert_allclose(chunk["unknown"], (low + high) / 2, atol=1e-5)
    np.testing.assert_allclose(chunk["known"][:, [0, 1, 2, 6]], chunk["unknown"][:, [0, 1, 2, 6]], atol=1e-6)
    a, b, half = (matrices(x[:, 3:6], "euler_xyz") for x in (low, high, chunk["known"]))
    whole = angle_between(a, b)
    np.testing.assert_allclose(angle_between(a, half), whole / 2, atol=1e-4)
    np.testing.assert_allclose(angle_between(half, b), whole / 2, atol=1e-4)
    assert whole.max() > 1
