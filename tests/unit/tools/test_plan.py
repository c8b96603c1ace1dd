"""`tools.plan` prints what the run would do, from metadata alone."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from opentau_train.errors import EXIT_OK, EXIT_USER
from opentau_train.tools import plan, reencode
from tests.lerobot_writer import Camera, Dataset, write
from tests.modal import MODAL
from tests.program import DATA, TINY_POLICY, TOY, metrics, train_here


def arguments(tmp_path, *more: str) -> list[str]:
    return [*TOY, f"paths.cache_dir={tmp_path / 'cache'}", *more]


def report(tmp_path, capsys, *more: str) -> str:
    assert plan.main(arguments(tmp_path, *more)) == EXIT_OK
    return capsys.readouterr().out


def test_numbers_are_those_of_the_run(tmp_path, capsys):
    options = ["trainer.steps=6", "validation.every=0"]
    text = report(tmp_path, capsys, *options, "--batches", "6")
    rows = metrics(train_here([*TOY, *options], tmp_path / "run"))
    mean = sum(row["Training/DistinctEpisodes"] for row in rows.values()) / 6
    assert f"{mean:.1f} distinct episodes of 4 samples" in text
    vif = sum(row["Training/PredictedVIF"] for row in rows.values()) / 6
    assert re.search(rf"VIF +{vif:.2f} a batch", text)
    assert f"{rows[6]['Training/Epoch']:.2f} epochs" in text
    assert "6 steps x 4 = 24 samples" in text


@pytest.mark.slow
def test_tokens_are_those_of_the_run_and_a_cap_is_refused_as_there(tmp_path, capsys):
    options = ["trainer.steps=8", "validation.every=0", "model.packing=true", "logger=none"]
    text = report(tmp_path, capsys, *options)
    rows = metrics(train_here([*TOY, *options], tmp_path / "run"))
    mean = sum(row["Training/PackingEfficiency"] for row in rows.values()) / 8
    tokens = re.search(r"tokens +(\d+) a step: \d+ of 44 a sample, packing efficiency (\d\.\d+)", text)
    assert float(tokens[2]) == pytest.approx(mean, abs=0.01)  # which of its dataset's prompts a window has isn't known
    assert int(tokens[1]) == pytest.approx(mean * 44 * 4, rel=0.01)
    padded = report(tmp_path, capsys, *options[:2])
    assert tokens[0] in padded and "model.packing=true computes no others" in padded
    assert plan.main(arguments(tmp_path, *options, "data.max_num_tokens_after_packing=43")) == EXIT_USER
    assert "has up to 44 tokens" in capsys.readouterr().err


def test_needs_metadata_only(tmp_path, capsys):
    root = shutil.copytree(DATA / "lerobot_v30", tmp_path / "set")
    for kind in ("videos", "data"):
        for path in filter(Path.is_file, (root / kind).rglob("*")):
            path.write_bytes(b"not read")
    changed = [f"data.sources.main.root={root}", "data.sources.main.control_mode=joint"]
    assert "main" in report(tmp_path, capsys, *changed)
    assert not (tmp_path / "cache" / "stats").exists()


def test_shares_and_repeats_follow_the_weights(tmp_path, capsys):
    weights = ["data.sources.main.weight=3", "data.sources.old.weight=1", "trainer.steps=100"]
    text = report(tmp_path, capsys, *weights)
    rows = {line.split()[0]: line.split() for line in text.splitlines()[1:3]}
    for name, share in (("main", 0.75), ("old", 0.25)):
        assert float(rows[name][5].rstrip("%")) == pytest.approx(100 * share, abs=0.5)
        assert float(rows[name][7]) == pytest.approx(400 * share / int(rows[name][2]), rel=0.03)


@pytest.mark.slow
def test_decoders_are_those_of_the_lanes_a_rank_has(tmp_path, capsys):
    one = re.search(r"decoders +(\d+) a rank \((\d+) lanes of 17\), about (\d+) MB", report(tmp_path, capsys))
    two = re.search(r"decoders +(\d+) a rank \((\d+) lanes", report(tmp_path, capsys, "--ranks", "2"))
    assert int(one[2]) == 17 and int(two[2]) == 9  # 16, and one more where two sources meet in a stretch
    assert int(one[1]) == pytest.approx(2 * int(two[1]), abs=2)
    assert 17 <= int(one[1]) <= 34  # a source with one camera, one with two


@pytest.mark.slow
def test_decoding_is_told_beside_the_variance_inflation_with_what_helps(tmp_path, capsys):
    """Four episodes of one group each: a batch of 64 has more of each than a lane may give it."""
    camera = {"observation.images.front": Camera(gop=250, episodes_per_file=1, size=(16, 16), options={"bf": "0"})}
    root = write(tmp_path / "long", Dataset((60, 45, 52, 61), cameras=camera))
    cache = f"paths.cache_dir={tmp_path / 'cache'}"
    batch = ["trainer.global_batch_size=64", "trainer.steps=4", "data.sources.main.val_split_ratio=0.0", cache]

    def planned(root) -> str:
        assert plan.main(["+recipe=lerobot", f"data.sources.main.root={root}", *batch, *TINY_POLICY]) == EXIT_OK
        return capsys.readouterr().out

    before = planned(root)
    cost = float(re.search(r"decoding +frames decoded for one used: (\d+\.\d\d) main; \d+ lanes", before)[1])
    assert cost > 1.5 and re.search(r"VIF +\d", before)
    gop = re.search(rf"tools\.reencode {root} --out NEW --gop (\d+)", before)[1]
    assert reencode.main([str(root), "--out", str(tmp_path / "new"), "--gop", gop, "--psnr", "15"]) == EXIT_OK
    capsys.readouterr()
    after = planned(tmp_path / "new")
    assert float(re.search(r"one used: (\d+\.\d\d) main", after)[1]) < 1.2 and "reencode" not in after


def test_reading_is_measured_where_it_is_asked_for_and_says_what_a_step_waits(tmp_path, capsys):
    text = report(tmp_path, capsys, "--read", "64", "--step-ms", "0.5", "--ranks", "1,2", "data.num_workers=2")
    found = re.search(r"reading +(\d+\.\d+) ms of a core a window \((\d+) read here\)", text)
    ms, read = float(found[1]), int(found[2])
    assert 32 <= read < 64 and ms > 0
    waits = re.findall(r"waiting +(\d+\.\d) ms of a step of (\d+\.\d) ms .*?: (\d) samples a rank, 2 workers", text)
    for share, (wait, step, told) in zip((4, 2), waits, strict=True):
        expected = max(0.0, share * ms / 2 - 0.5)
        assert (float(wait), float(step), int(told)) == (
            pytest.approx(expected, abs=0.06),
            pytest.approx(expected + 0.5, abs=0.06),
            share,
        )
    assert plan.main(arguments(tmp_path, "--step-ms", "10")) == EXIT_USER
    assert "add --read" in capsys.readouterr().err


@pytest.mark.slow
def test_modes_are_told_and_what_lanes_hold_of_the_future(tmp_path, capsys):
    """128 frames ahead at 32x32: some 390 kB a camera and lane of the source that reads them."""
    joint = ["data.sources.main.mode=joint", "data.sources.main.mode_probabilities={policy:3,wam:1}"]
    plain, text = (report(tmp_path, capsys, *MODAL, "data.future.stride=64", *words) for words in ([], joint))
    assert "modes of main: policy 75%, wam 25%; old: policy 100%; 2 future frames of front, wrist" in text
    assert "modes of main: policy 100%; old: policy 100%; 2 future frames of front, wrist" in plain
    assert "future" not in report(tmp_path, capsys)
    held = [int(re.search(r"about (\d+) MB", report_of)[1]) for report_of in (plain, text)]
    assert 2 <= held[1] - held[0] <= 16 * 2 * 0.4


def memory_rows(text: str) -> dict[int, dict[str, str]]:
    """{ranks: {column: cell}} of the memory's table."""
    lines = [re.split(r"  +", line) for line in text[text.index("\nmemory ") + 1 :].splitlines()]
    names, rows = lines[0][1:], [line for line in lines[1:] if line[0] == ""]
    return {int(row[1]): dict(zip(names, row[1:], strict=True)) for row in rows}


@pytest.mark.slow
def test_memory_is_what_the_run_says_and_what_shards_and_samples_make_of_it(tmp_path, capsys):
    train_here([*TOY, "trainer.steps=1", "validation.every=0", "checkpoint.every=0"], tmp_path / "run")
    told = " ".join(capsys.readouterr().err.split())
    said = re.search(r" memory (\S+ \S+) a rank: (.*) \(4 samples at a time\) look at", told)
    rows = memory_rows(report(tmp_path, capsys, "--ranks", "1,4"))
    assert rows[1]["samples"] == "4" and rows[4]["samples"] == "1"
    for part in said[2].split(", "):
        name, _, size = part.partition(" ")
        assert rows[1][name] == size
    assert rows[1]["a rank"] == said[1]
    sharded = memory_rows(report(tmp_path, capsys, "parallelism=fsdp", "--ranks=1,4"))
    assert sharded[1] == rows[1] and sharded[4]["gathered"] != rows[4]["gathered"] == "0"
    whole, quarter = (float(r[4]["moments"].removesuffix(" MiB")) for r in (rows, sharded))
    assert quarter == pytest.approx(whole / 4, rel=0.05)


@pytest.mark.slow
def test_memory_is_that_of_what_trains_and_of_its_numbers(tmp_path, capsys):
    full, adapters, half = (
        {part: float(rows[1][part].split()[0]) for part in ("parameters", "gradients", "moments")}
        for rows in (
            memory_rows(report(tmp_path, capsys, *words, "model.width=128", "--ranks", "1"))
            for words in ([], ["finetune=lora"], ["finetune=lora", "trainer.precision=bf16_params"])
        )
    )
    assert adapters["parameters"] > full["parameters"] and adapters["moments"] < 0.2 * full["moments"]
    assert adapters["parameters"] - full["parameters"] == pytest.approx(adapters["gradients"], abs=0.02)
    assert half["parameters"] == pytest.approx(adapters["parameters"] / 2, abs=0.02)
    assert half["moments"] == pytest.approx(adapters["moments"] / 2, abs=0.02)


@pytest.mark.slow
def test_too_small_a_device_is_told_of_with_arguments_that_take_less(tmp_path, capsys):
    assert "warning    --ranks" not in report(tmp_path, capsys, "--device-memory=1")
    text = report(tmp_path, capsys, "--device-memory=0.005", "model.depth=3")
    (warning,) = [line for line in text.splitlines() if line.startswith("warning    --ranks 1: a rank needs")]
    proposed = re.findall(r"([a-z_.]+=\w+) \(([0-9.]+ MiB)\)", warning)
    assert len(proposed) == 3
    for argument, size in proposed:
        assert memory_rows(report(tmp_path, capsys, "model.depth=3", argument))[1]["a rank"] == size


def test_reading_in_order_is_warned_of_and_needs_one_lane_a_worker(tmp_path, capsys):
    options = [f"data.sources.{name}.iterable_shuffle=false" for name in ("main", "old")]
    text = report(tmp_path, capsys, *options, "data.num_workers=3")
    assert "for debugging only" in text
    assert re.search(r"decoders +6 a rank \(in order: one lane a worker\)", text)  # one source has two cameras


def test_a_source_for_validation_only_is_trained_on_never(tmp_path, capsys):
    text = report(tmp_path, capsys, "data.sources.old.val_split_ratio=1.0")
    old = next(line.split() for line in text.splitlines() if line.startswith("old "))
    assert "validation" in old and old[-1] == "0.00"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("trainer.stepz=3", "did you mean 'steps'"),
        ("+recipe=droid_polizy", "did you mean 'droid_policy'"),
        ("data.sources.main.root=/nowhere", "/nowhere"),
        ("--ranks=0", "--ranks to 1 or more"),
        ("--ranks=2,0", "--ranks to 1 or more"),
        ("--batches=0", "--batches to 1 or more"),
        ("--device-memory=0", "--device-memory must be greater than 0"),
        ("foo", "can't read the argument 'foo'"),
        ("trainer=3", "trainer is a section"),
        ("trainer.steps=1,2", "is a sweep"),
        ("--nope", "unrecognized argument: --nope"),
        ("--rank=2", "unrecognized argument: --rank"),
        ("--config-dir", "the directory '' is not there"),
        ("--config-dir=nowhere", "the directory 'nowhere' is not there"),
    ],
)
def test_a_mistake_is_answered_as_by_the_program(tmp_path, capsys, wrong, said):
    given = [a for a in TOY if not a.startswith("+recipe")] if wrong.startswith("+recipe") else TOY
    assert plan.main([*given, wrong]) == EXIT_USER
    assert said in capsys.readouterr().err


def test_arguments_apart_from_their_keys_are_no_plan_for_something_else(capsys):
    assert plan.main([*TOY, "trainer.steps", "3"]) == EXIT_USER
    assert "can't read the argument 'trainer.steps'" in capsys.readouterr().err


@pytest.mark.parametrize("form", [["--config-dir", "{}"], ["--config-dir={}"], ["-cd", "{}"]], ids=" ".join)
def test_a_users_own_recipe_is_planned(form, tmp_path, capsys):
    (tmp_path / "mine/recipe").mkdir(parents=True)
    text = "# @package _global_\ndefaults: [lerobot, _self_]\ntrainer: {steps: 7}\n"
    (tmp_path / "mine/recipe/good.yaml").write_text(text)
    mine = [part.format(tmp_path / "mine") for part in form]
    given = [argument for argument in TOY if not argument.startswith("+recipe")]
    assert plan.main([*mine, "+recipe=good", *given]) == EXIT_OK
    assert "7 steps x 4 = 28 samples" in capsys.readouterr().out


def test_a_batch_that_the_ranks_can_t_share_is_a_user_error(tmp_path, capsys):
    assert plan.main(arguments(tmp_path, "--ranks", "3")) == EXIT_USER
    assert "can't be shared by 3 ranks" in capsys.readouterr().err
