"""Layouts of the ranks: what they do to a step, the degrees they take, and the configurations that choose them."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opentau_train.distributed.parallel import data_parallel_degrees
from opentau_train.errors import UserError
from tests.nightly import AT_NIGHT, at_night
from tests.program import TOY, run, torchrun

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(
    ("replicate", "shard"),
    [pytest.param(2, 1, marks=AT_NIGHT), pytest.param(1, 2, marks=AT_NIGHT), (2, 2)],  # which combines them
    ids=["ddp_2", "fsdp_2", "hsdp_2x2"],
)
def test_a_layout_changes_no_gradient_and_reduces_once_in_float32(replicate, shard):
    script = Path(__file__).parent / "parallel_cases.py"
    done = torchrun(replicate * shard, script, str(replicate), str(shard))
    assert done.returncode == 0 and done.stdout.count("all held") == replicate * shard, done.stderr[-4000:]


@given(size=st.integers(1, 512), replicate=st.integers(1, 64) | st.just(-1), shard=st.integers(1, 64) | st.just(-1))
def test_degrees_fill_the_world_or_the_arithmetic_is_shown(size, replicate, shard):
    given_degrees = [d for d in (replicate, shard) if d != -1]
    product = 1
    for degree in given_degrees:
        product *= degree
    fits = size % product == 0 if len(given_degrees) < 2 else product == size
    if fits:
        found = data_parallel_degrees(replicate, shard, size)
        assert found[0] * found[1] == size
        assert replicate in (-1, found[0]) and shard in (-1, found[1])
    else:
        with pytest.raises(UserError) as caught:
            data_parallel_degrees(replicate, shard, size)
        message = str(caught.value)
        assert str(size) in message and all(str(d) in message for d in given_degrees)


@pytest.mark.parametrize(
    ("degrees", "size", "words"),
    [
        ((-1, 3), 4, ["4 = 1 x 3 + 1", "data_parallel_shard_degree=3", "1, 2, 4", "run 3 processes"]),
        ((8, -1), 4, ["4 = 0 x 8 + 4", "data_parallel_replicate_degree=8", "run 8 processes"]),
        ((2, 4), 4, ["2 x shard degree 4 = 8", "4 processes"]),
    ],
)
def test_degree_errors_say_what_would_fit(degrees, size, words):
    with pytest.raises(UserError) as caught:
        data_parallel_degrees(*degrees, size)
    assert all(word in str(caught.value) for word in words), caught.value


@at_night
@pytest.mark.parametrize("choice", ["fsdp", "hsdp"])
def test_a_choice_of_parallelism_is_one_word(choice, tmp_path):
    command = [*TOY, f"parallelism={choice}", "parallelism.activation_checkpointing=true", "trainer.steps=2"]
    done = run([*command, "trainer.precision=bf16", "trainer.ema_decay=0.9", f"paths.run_dir={tmp_path / 'two'}"], 2)
    assert done.returncode == 0 and "finished at step 2" in done.stderr, done.stderr
    done = run([*command, "parallelism.data_parallel_shard_degree=3", f"paths.run_dir={tmp_path / 'three'}"])
    assert done.returncode == 2 and "1 processes" in done.stderr and "Traceback" not in done.stderr
