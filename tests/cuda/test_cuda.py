"""What one card can show: `make test-cuda`. Skipped where there is none.

NCCL refuses two ranks on one card, so a world of several ranks, its reductions and the memory that sharding saves are
the CPU's to show (tests/distributed, by gloo). Here: NCCL with one rank, numbers that agree with the CPU's in every
precision and compiled, the fused optimizer, copies from pinned memory, how often the host waits, memory, speed.

Every test also has a case on the CPU, at night, which shows that the test itself works.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch

from opentau_train.data.decode.decoding import Decoding
from opentau_train.data.decode.images import Resizer
from opentau_train.data.decode.video import VideoPool
from opentau_train.data.decode.video_file import VideoError
from tests import warm
from tests.lerobot_writer import AV1, H264_B, HEVC_B, Camera, Dataset, picture, write, write_video
from tests.nightly import AT_NIGHT
from tests.program import REPO, TOY, command, environment, metrics

ON_CARD = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="left out: there is no CUDA card here"),
]
BOTH = pytest.mark.parametrize("device", [pytest.param("cpu", marks=AT_NIGHT), pytest.param("cuda", marks=ON_CARD)])
RUN = [*TOY, "trainer.steps=3", "validation.every=3", "validation.max_samples_per_group=4", "logger=none"]


def started(device: str) -> Callable[..., subprocess.CompletedProcess]:
    """What runs a command: a card wants a new interpreter."""
    return warm.run if device == "cpu" else partial(subprocess.run, capture_output=True, text=True)


def case(name: str, device: str, *arguments: int) -> dict:
    """What `tests.cuda.cases` prints of a case."""
    words = [sys.executable, "-m", "tests.cuda.cases", name, device, *map(str, arguments)]
    done = started(device)(words, cwd=REPO, env=environment(), timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def numbers(tmp_path, name: str, device: str, *overrides: str) -> dict[int, dict[str, float]]:
    """{step: its numbers} of a run on `device`."""
    only = ["trainer.device=cpu"] if device == "cpu" else []
    paths = [f"paths.run_dir={tmp_path / name}", f"paths.cache_dir={tmp_path / 'cache'}"]
    done = started(device)(command([*RUN, *only, *overrides, *paths]), cwd=REPO, env=environment(), timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return metrics(tmp_path / name)


@BOTH
@pytest.mark.parametrize(
    ("overrides", "tolerance"),
    [
        pytest.param([], 1e-4, id="float32"),
        pytest.param(["trainer.precision=bf16"], 0.03, id="bf16"),
        pytest.param(["trainer.compile=true"], 1e-3, id="compiled"),
        pytest.param(["model.packing=true"], 1e-4, id="packed"),
        pytest.param(["model.packing=true", "trainer.precision=bf16"], 0.03, id="packed_bf16"),  # by torch's kernel
    ],
)
def test_losses_are_those_of_the_cpu_in_float32(tmp_path, device, overrides, tolerance):
    if device == "cpu" and "trainer.compile=true" in overrides:
        overrides = [*overrides, "trainer.compile_backend=aot_eager"]  # inductor needs a C++ compiler there
    reference = numbers(tmp_path, "reference", "cpu")
    given = numbers(tmp_path, "given", device, *overrides)
    assert given.keys() == reference.keys() == {1, 2, 3}
    for step, row in reference.items():
        for tag in (t for t in row if t.endswith(("/MSE", "/CE", "/Loss", "Training/GradNorm"))):
            assert given[step][tag] == pytest.approx(row[tag], rel=10 * tolerance, abs=tolerance), (step, tag)


@BOTH
def test_deterministic_runs_are_equal_to_the_last_bit(tmp_path, device):
    first, second = (numbers(tmp_path, name, device, "trainer.deterministic=true") for name in ("one", "two"))
    assert first == second


@BOTH
def test_a_process_ends_with_the_runs_own_exit_code(tmp_path, device):
    """Not with that of a library's abort while the process goes: a scheduler decides by it."""
    only = ["trainer.device=cpu"] if device == "cpu" else []
    run_dir, workers = f"paths.run_dir={tmp_path / 'run'}", "data.num_workers=2"
    words = [*RUN, *only, run_dir, workers, f"paths.cache_dir={tmp_path / 'cache'}"]
    for more, code in (["trainer.stop_after=2"], 75), (["resume=auto"], 0):
        done = started(device)(command([*words, *more]), cwd=REPO, env=environment(), timeout=200)
        assert done.returncode == code, done.stdout + done.stderr


CODECS = {
    "h264": Camera("libx264", (144, 256), gop=12, options=H264_B),
    "h264_full_range": Camera("libx264", (144, 256), gop=12, options=H264_B, colour=(1, 2)),
    "hevc": Camera("libx265", (144, 256), gop=12, options=HEVC_B),
    "av1": Camera("libsvtav1", (144, 256), gop=12, options=AV1),
}


@BOTH
@pytest.mark.parametrize("codec", CODECS)
def test_a_cards_decoder_gives_the_same_pictures_in_any_order(tmp_path, device, codec):
    """To a level of 255: the standards leave a decoder no choice, and both are scaled by the same code."""
    decoder, path, times = {"cpu": "cpu", "cuda": "nvdec"}[device], tmp_path / "video.mp4", np.arange(40) / 30
    write_video(path, CODECS[codec], [(s, picture(0, i, codec, (144, 256))) for i, s in enumerate(times)])
    order, resizer = [*range(40), 5, 39, 6, 7, 30, 0], Resizer((72, 128), "area")
    read = {}
    for name in ("cpu", decoder):
        cursor = VideoPool(decoding=Decoding(video_decoder=name)).cursor()
        try:
            read[name] = np.stack([resizer(cursor.read(path, times[i], 1e-4)) for i in order])
        except VideoError as error:
            assert codec == "av1" and name == "nvdec" and "data.video_decoder=cpu does" in str(error)
            pytest.skip("this card decodes no AV1, and says so")
    assert np.abs(read["cpu"].astype(int) - read[decoder]).max() <= 1


@BOTH
def test_a_run_that_decodes_on_the_card_has_the_losses_of_one_that_does_not(tmp_path, device):
    """Loader workers and validation's: new processes, each with decoders on the card."""
    camera = Camera("libx264", (144, 256), gop=12, options=H264_B)
    root = write(tmp_path / "set", Dataset(cameras={"observation.images.front": camera}))
    only = ["trainer.device=cpu"] if device == "cpu" else []
    data = [
        f"data.sources.main.root={root}",
        "~data.sources.old",
        "data.num_workers=2",
        f"paths.cache_dir={tmp_path / 'cache'}",
    ]
    rows = []
    for decoder in ("cpu", {"cpu": "cpu", "cuda": "nvdec"}[device]):
        run_dir = tmp_path / f"run{len(rows)}"
        words = [*RUN, *only, *data, f"data.video_decoder={decoder}", f"paths.run_dir={run_dir}"]
        done = started(device)(command(words), cwd=REPO, env=environment(), timeout=280)
        assert done.returncode == 0, done.stdout + done.stderr
        rows.append(metrics(run_dir))
    for step, row in rows[0].items():
        for tag in (t for t in row if t.endswith(("/MSE", "/CE", "/Loss"))):
            assert rows[1][step][tag] == pytest.approx(row[tag], rel=1e-3), (step, tag)


@BOTH
def test_a_process_group_of_one_rank_keeps_what_it_is_given(device):
    told = case("collectives", device)
    assert told["backend"] == {"cuda": "nccl", "cpu": "gloo"}[device]
    assert told["sums"] == [[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]] * 3 and told["exact"]


@BOTH
def test_sharded_blocks_on_one_rank_agree_and_hold_their_parameters_once(device):
    """One rank's shard is everything; at most, gradients, one gathered block in bfloat16 and the activations come on
    top."""
    told = case("sharded", device)
    assert told["error"] < 0.05
    assert told["built"] <= 1.1 * told["parameters"] and told["peak"] <= 4 * told["parameters"]


@BOTH
def test_the_optimizer_is_fused_and_lies_on_the_device(device):
    told = case("optimizer", device)
    assert told["fused"] and all(told["fused"])
    assert told["devices"] == [device]


@BOTH
def test_a_run_holds_about_what_was_foreseen(device):
    """Kernels' work space comes on top, and not all is held at once."""
    told = case("foreseen", device)
    assert told["foreseen"] > 0 and not told["unknown"]
    assert device == "cpu" or 0.7 < told["held"] / told["foreseen"] < 1.4, told


@BOTH
def test_more_steps_add_no_wait_but_at_the_log_interval_and_copies_from_pinned_memory(device):
    few, many = case("counted", device, 4), case("counted", device, 10)
    added = {name: many[name] - few[name] for name in few}
    assert added["waits"] <= 2, added  # log_every=3: two more lines
    assert added["pageable"] == 0, added
    assert added["pinned"] >= 6 or device == "cpu", added


@BOTH
def test_the_table_of_a_cards_throughput_and_memory_is_printed(capsys, device):
    """The published pi0 among the rows of a card: 53 GB of parameters, gradients and moments."""
    rows = "flow_tiny,flow_small,pi0" if device == "cuda" else "pi0_tiny"
    options = ["--device", device, "--rows", rows, "--steps", "12" if device == "cuda" else "2", "--workers", "2"]
    command = [sys.executable, "benchmarks/one_card.py", *options]
    done = started(device)(command, cwd=REPO, env=environment(), timeout=280)
    with capsys.disabled():
        print(f"\n{done.stdout}")
    assert done.returncode == 0 and "failed" not in done.stdout, done.stdout + done.stderr
