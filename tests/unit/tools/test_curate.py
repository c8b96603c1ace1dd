"""`tools.curate`: the formulas on numbers that are known, and a real run in which labels are wrong on purpose."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
import torch
from torch import nn

from opentau_train.errors import EXIT_OK, EXIT_USER, UserError
from opentau_train.tools import curate
from opentau_train.tools.curating import judge
from opentau_train.tools.curating.gradients import Gradients, choose
from opentau_train.tools.curating.judge import Estimate
from opentau_train.tools.curating.losses import of_training, of_validation
from opentau_train.tools.curating.sketch import Sketch, cosine_error
from opentau_train.tools.flight import Losses
from tests.fake_source import mixture_of
from tests.mislabelled import training, write_source
from tests.nightly import at_night
from tests.program import metrics, train_here


def sketched(vectors: np.ndarray, num_buckets: int, seed: int) -> np.ndarray:
    layer = nn.Linear(vectors.shape[1] - 1, 1)
    sketch, rows = Sketch(layer, num_buckets, seed), []
    for vector in torch.from_numpy(vectors).float():
        layer.weight.grad, layer.bias.grad = vector[None, :-1].clone(), vector[-1:].clone()
        rows.append(sketch.of_gradient().numpy())
    return np.stack(rows)


def test_sketches_keep_cosines_within_the_error_that_is_said():
    rng = np.random.default_rng(0)
    pair = rng.normal(size=(2, 1500))
    pair[1] += pair[0]
    true, m = float(judge.cosines(pair[0], pair[1])), 256
    found = np.array([judge.cosines(*sketched(pair, m, seed).astype(float)) for seed in range(200)])
    error = float(cosine_error(np.array(true), m))
    assert abs(found.mean() - true) < 4 * error / math.sqrt(200)
    assert found.std() == pytest.approx(error, rel=0.2)
    assert np.array_equal(sketched(pair, m, 3), sketched(pair, m, 3))
    assert not np.array_equal(sketched(pair, m, 3), sketched(pair, m, 4))


def test_parameters_of_the_same_size_have_other_buckets():
    twins = nn.ModuleList([nn.Linear(64, 1, bias=False) for _ in range(2)])
    sketch = Sketch(twins, 512)
    rows = []
    for chosen in twins:
        for twin in twins:
            twin.weight.grad = torch.ones_like(twin.weight) * (twin is chosen)
        rows.append(sketch.of_gradient())
    assert not torch.equal(*rows)


def clustered(rng: np.random.Generator, signs: list[list[float]], m: int = 64, noise: float = 1.0) -> Gradients:
    """Gradients of windows around one direction: `signs[d][e]` times it, in episode e of dataset d; as many held out
    of sign 1."""
    rows = [(d, e, d, False, sign) for d, own in enumerate(signs) for e, sign in enumerate(own) for _ in range(8)]
    rows += [
        (d, 100 + e, d, True, np.sign(np.median(own)))
        for d, own in enumerate(signs)
        for e in range(4)
        for _ in range(8)
    ]
    columns = [np.array(column) for column in zip(*rows, strict=True)]
    vector = columns[4][:, None] * np.ones(m) / 4 + noise * rng.normal(size=(len(rows), m))
    return Gradients(*columns[:4], np.ones(len(rows)), vector.astype(np.float32))


def test_the_error_of_an_alignment_is_its_spread_over_repetitions():
    found = [
        judge.alignments(clustered(np.random.default_rng(i), [[1.0] * 12], noise=2.0), 1, [0])[0, 0] for i in range(150)
    ]
    spread = np.std([e.value for e in found])
    # A sketch's own part of the error is left out: the vectors here are no sketches of longer ones.
    said = np.mean([math.sqrt(e.error**2 - float(cosine_error(np.array(e.value), 64)) ** 2) for e in found])
    assert said == pytest.approx(spread, rel=0.35)


def test_a_source_that_points_against_the_others_is_dropped():
    gradients = clustered(np.random.default_rng(0), [[1.0] * 8, [1.0] * 8, [-1.0] * 8])
    found = judge.alignments(gradients, 3, range(3))
    scores = judge.source_scores(found, [0, 1, 2], [1 / 3] * 3, set())
    assert scores[2].is_negative and not scores[0].is_negative and not scores[1].is_negative
    weights = judge.suggested_weights([1 / 3] * 3, scores)
    assert weights is not None and weights[2] == 0 and weights[0] == pytest.approx(0.5, abs=0.1)


def test_two_sources_that_contradict_each_other_need_a_target():
    gradients = clustered(np.random.default_rng(0), [[1.0] * 8, [-1.0] * 8])
    found = judge.alignments(gradients, 2, range(2))
    both = judge.source_scores(found, [0, 1], [0.5, 0.5], set())
    assert all(score.is_negative for score in both) and judge.suggested_weights([0.5, 0.5], both) is None
    told = judge.source_scores(found, [0, 1], [0.5, 0.5], {0})
    assert judge.suggested_weights([0.5, 0.5], told) == [1.0, 0.0]


def test_equal_sources_call_for_no_change():
    gradients = clustered(np.random.default_rng(0), [[1.0] * 8] * 3)
    scores = judge.source_scores(judge.alignments(gradients, 3, range(3)), [0, 1, 2], [1 / 3] * 3, set())
    weights = judge.suggested_weights([1 / 3] * 3, scores)
    assert weights is None or weights == pytest.approx([1 / 3] * 3, abs=0.05)


def test_noise_is_0_of_right_1_of_random_and_2_of_opposite_labels():
    signs = [1.0] * 14 + [0.0, -1.0]
    noise = judge.label_noise(clustered(np.random.default_rng(0), [signs], noise=0.5), set())
    assert noise[0, 14].value == pytest.approx(1.0, abs=4 * noise[0, 14].error)
    assert noise[0, 15].value == pytest.approx(2.0, abs=4 * noise[0, 15].error)
    assert np.mean([noise[0, e].value for e in range(14)]) == pytest.approx(0.0, abs=0.2)
    keys = list(noise)
    chosen = {keys[i] for i, bad in enumerate(judge.noisy([noise[k] for k in keys])) if bad}
    assert chosen == {(0, 14), (0, 15)}


def test_gradients_that_tell_nothing_tell_no_noise():
    nothing = clustered(np.random.default_rng(1), [[0.0] * 8])
    assert judge.label_noise(nothing, set()) == {}


def test_few_sound_episodes_are_called_noisy():
    rng = np.random.default_rng(0)
    sound = [Estimate(float(v), 0.3) for v in rng.normal(0.4, 0.3, 400)]
    assert sum(judge.noisy(sound)) <= 4


def test_an_outlier_is_told_in_spreads_of_its_dataset():
    z = judge.outliers(np.array([0.0, 0.1, -0.1, 0.05, -0.05, 2.0]))
    assert z[5] > 3.5 and max(abs(z[:5])) < 3.5
    assert np.isnan(judge.outliers(np.zeros(5))).all()


def test_the_excess_of_an_episode_is_free_of_the_trend():
    """Losses fall a thousandfold; episode 1 comes early and late, each time twice as high as its dataset."""
    step = np.repeat(np.arange(1, 401), 4)
    episode = np.tile([0, 1, 2, 3], 400)
    trend = 10.0 ** (-3 * step / 400)
    loss = trend * np.where(episode == 1, 2.0, 1.0)
    losses = of_training(Losses(("a",), step, np.zeros_like(step), episode, loss))
    assert losses["a", 1].excess - losses["a", 0].excess == pytest.approx(1 / 1.25, rel=1e-6)
    assert losses["a", 1].num == 200 and losses["a", 0].loss < 0.05


def test_the_losses_of_the_best_pass_are_those_that_a_run_keeps(tmp_path):
    assert of_validation(tmp_path, [1.0, 0.1]) == (0, {})
    (tmp_path / "passes").mkdir()
    sums = np.array([[[2.0, 4.0], [0.0, 0.0]], [[9.0, 4.0], [6.0, 2.0]], [[1.0, 4.0], [6.0, 2.0]]])
    passes = {"steps": [7, 9], "losses": [1.0, 1.1], "sums": [sums, 3 * sums], "best": 7, "lowest": 7}
    np.savez(tmp_path / "passes" / "00000009.npz", episodes=np.array(["a/3", "a/5", "a/5"]), **passes)  # 5: two modes
    step, losses = of_validation(tmp_path, [1.0, 0.1])
    assert step == 7 and losses["a", 3].loss == 0.5 and losses["a", 5].loss == pytest.approx(10 / 8 + 0.1 * 12 / 4)
    assert losses["a", 5].excess == pytest.approx(-losses["a", 3].excess) and losses["a", 5].excess > 0
    with pytest.raises(UserError, match="the record of a validation pass"):
        of_validation(tmp_path, [1.0])


def test_windows_are_spread_over_the_episodes_that_a_key_draws(tmp_path):
    blocks = mixture_of({"a": "9,9,9,9,12,3"}, tmp_path).datasets[0].train
    some, others = (dict(choose(blocks, 3, 4, key)) for key in (1, 2))
    assert len(some) == 3 and all(len(frames) == len(set(frames)) <= 4 for frames in some.values())
    assert dict(choose(blocks, 3, 4, 1)) == some and (
        some.keys() != others.keys() or len(np.unique(blocks.episode)) < 5
    )
    whole = dict(choose(blocks, 10**6, 10**6, 1))
    assert sum(map(len, whole.values())) == blocks.num_windows


STEPS = 1000
WRONG = {2, 4, 10, 11}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(arguments, run) of three sources, of which `turned` has all signs wrong and `partly` those of four episodes."""
    folder = tmp_path_factory.mktemp("curate")
    roots = {
        "main": write_source(folder / "main", 1),
        "partly": write_source(folder / "partly", 2, wrong=WRONG),
        "turned": write_source(folder / "turned", 3, wrong=range(24)),
    }
    arguments = training(roots, STEPS)
    return arguments, train_here(arguments, folder / "run")


@at_night
def test_finds_what_is_mislabelled_and_leaving_it_out_helps(runs, tmp_path, capsys):
    """The user trusts `main`, and asks what hurts it."""
    arguments, run = runs
    assert curate.main([str(run), "--target", "main", "--out", str(tmp_path / "curate.json")]) == EXIT_OK
    shown = capsys.readouterr().out
    told = json.loads((tmp_path / "curate.json").read_text())
    assert told["sources"][0]["dataset"] == "turned"
    assert {(e["dataset"], e["episode"]) for e in told["episodes"] if e["is_wrong"] and e["dataset"] != "turned"} == {
        ("partly", episode) for episode in WRONG
    }
    overrides = re.findall(r"data\.sources\.\S+", shown)
    assert "data.sources.turned.weight=0" in overrides
    assert "data.sources.partly.exclude_episodes=[2,4,10,11]" in overrides
    before, again = (
        m[STEPS] for m in (metrics(run), metrics(train_here([*arguments, *overrides], tmp_path / "again")))
    )
    print(shown, *({k: v for k, v in row.items() if "main" in k} for row in (before, again)), sep="\n")
    tag = next(t for t in before if re.fullmatch(r"Validation/main/\w+/MSE", t))
    assert again[tag] < before[tag] - 2 * max(row[f"{tag}/StdErr"] for row in (before, again))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--target", "mian"], "did you mean 'main'"),
        (["--episodes", "1"], "--episodes must be at least 2"),
        (["trainer.steps=3"], "trainer.steps is the run's and can't be changed"),
        (["--out", "/no_such_folder/deep/x.json"], "there is no directory /no_such_folder"),
    ],
)
@at_night
def test_mistakes_are_answered_with_a_remedy(runs, words, said, capsys):
    assert curate.main([str(runs[1]), *words]) == EXIT_USER
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_a_directory_that_is_no_run_is_a_mistake(tmp_path, capsys):
    assert curate.main([str(tmp_path)]) == EXIT_USER
    assert "no complete checkpoint there" in capsys.readouterr().err


@at_night
def test_one_checkpoint_is_looked_at_by_its_path(runs, capsys):
    """Without --target nobody is dropped for contradicting the others by chance, and the tables are there."""
    one = runs[1] / "checkpoints" / "00000500"
    assert curate.main([str(one), "--episodes", "4", "--windows", "4", "--draws", "1"]) == EXIT_OK
    shown = capsys.readouterr().out
    assert "at step 500\n" in shown and "sources, worst first" in shown and "episodes, worst first" in shown
