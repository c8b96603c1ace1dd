"""The training stream on real rows and real video: any topology gives the same samples; bad files never stop it."""

import json
import shutil
from contextlib import closing

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset

from opentau_train import composing
from opentau_train.config.arguments import settable
from opentau_train.config.settings import load_settings
from opentau_train.data.load.stream import ShardDataset, TrainPlan
from opentau_train.data.load.workers import SharedNumber, one_pass, passes
from opentau_train.data.mixture.open import open_mixture
from opentau_train.errors import EXIT_USER, UserError
from tests.fake_source import addresses, global_batches, in_order, mixture_of, with_data
from tests.lerobot_writer import DEFAULT_COLUMNS, Camera, Dataset, write
from tests.nightly import by_day
from tests.program import TOY, run

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

BATCH = 4


def mixture(tmp_path, *overrides):
    import hydra

    with hydra.initialize_config_module("opentau_train.conf", version_base="1.3"):
        chosen = [settable(o) for o in [*TOY, f"paths.cache_dir={tmp_path / 'cache'}", *overrides]]
        return open_mixture(load_settings(composing.plain(hydra.compose("train", chosen))))


def content(batch):
    """All that the policy could see of each sample, and its address."""
    tensors = [*batch.images.values(), batch.state, batch.actions, batch.action_is_pad, batch.key]
    rows = zip(addresses(batch).tolist(), batch.prompt, *tensors, strict=True)
    return [(str(where), prompt, *(t.numpy().tobytes() for t in parts)) for where, prompt, *parts in rows]


def collect(found, tmp_path, *, size=1, workers=0, first=0, last=6, **data):
    """The global batches' samples in order, and the quarantine without its times."""
    path = tmp_path / f"quarantine-{size}-{workers}.jsonl"
    path.unlink(missing_ok=True)
    tape = found.tape(BATCH)
    found = with_data(found, num_workers=workers, **data)
    samples, substituted = [], 0
    for step, parts in enumerate(global_batches(found, tape, path, size=size, first=first, last=last)):
        for part in parts:
            if part.error is not None:
                raise part.error
            substituted += part.num_substituted
        samples += in_order(parts, tape, first + step, content)
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    assert len(rows) >= substituted
    return samples, sorted((r["dataset"], r["episode"], r["frame"], r["pass"], r["cause"]) for r in rows)


@pytest.fixture(scope="module")
def read_whole(tmp_path_factory):
    """(mixture, its samples as one process reads them)."""
    folder = tmp_path_factory.mktemp("whole")
    found = mixture(folder, "data.history=1", "data.dropout.camera=0.3", "data.dropout.prompt=0.3")
    whole, _ = collect(found, folder)
    assert len(set(whole)) == len(whole) == 6 * BATCH
    return found, whole


@pytest.mark.slow
@pytest.mark.parametrize(("size", "workers"), [(1, 1), (1, 3), (2, 0), (4, 2), (2, 8)])
def test_any_topology_sees_the_same_pixels_actions_and_prompts(size, workers, read_whole, tmp_path):
    found, whole = read_whole
    assert collect(found, tmp_path, size=size, workers=workers)[0] == whole


def test_a_stream_begun_at_any_step_is_the_rest_of_the_whole(tmp_path):
    found = mixture(tmp_path)
    whole, _ = collect(found, tmp_path)
    for first in (1, 3, 5):
        assert collect(found, tmp_path, size=2, workers=first % 3, first=first)[0] == whole[first * BATCH :]


def test_in_order_reading_is_the_dataset_s_order_and_says_what_it_does_to_gradients(tmp_path, caplog):
    caplog.set_level("WARNING", "opentau_train")
    found = mixture_of({"d": "5,3"}, tmp_path, source={"iterable_shuffle": False}, num_workers=0)
    tape = found.tape(4)
    parts = global_batches(with_data(found, num_workers=3), tape, tmp_path / "q", size=2, first=0, last=2)
    seen = [
        row for step, p in enumerate(parts) for row in in_order(p, tape, step, lambda b: addresses(b)[:, 2:].tolist())
    ]
    assert seen == [[1000, f] for f in range(5)] + [[1001, f] for f in range(3)]
    assert "iterable_shuffle=false" in caplog.text and "gradients are correlated" in caplog.text


def test_a_source_says_what_its_blocks_are(tmp_path):
    found = mixture(tmp_path)
    for dataset in found.datasets:
        blocks = dataset.source.get_shuffle_blocks()
        assert blocks.dtype == np.int32 and blocks[:, 2].tolist() == dataset.source.episodes.length.tolist()


def test_stride_and_rate_of_a_source_reach_its_samples(tmp_path, caplog):
    caplog.set_level("WARNING", "opentau_train")
    every = mixture_of({"d": "9,4", "e": "5"}, tmp_path, source={"sample_stride": 4})
    assert every.datasets[0].train.num_windows == 4 and "different rates" not in caplog.text
    frames = {
        int(f)
        for (p,) in global_batches(every, every.tape(4), tmp_path / "q", size=1, first=0, last=3)
        for f in p.batch.frame_index
    }
    assert frames == {0, 4, 8}
    plain = mixture(tmp_path, "data.drop_tail=true", "data.chunk_length=5")
    rates = [d.source.fps for d in plain.datasets]
    assert rates[0] != rates[1] and "different rates" in caplog.text  # the two toys differ: never in silence
    halved = mixture(tmp_path, "data.drop_tail=true", "data.chunk_length=5", f"data.sources.main.fps={rates[0] / 2}")
    lost = plain.datasets[0].train.num_windows - halved.datasets[0].train.num_windows
    assert lost == 4 * len(plain.datasets[0].train.length)  # its chunk of 5 reaches over 9 rows instead of 5
    assert halved.datasets[1].train.num_windows == plain.datasets[1].train.num_windows
    sample = next(global_batches(halved, halved.tape(4), tmp_path / "q", size=1, first=0, last=1))[0].batch
    assert not sample.action_is_pad[sample.dataset_index == 0].any()


# -- damaged files ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """Six episodes, one file of rows and of frames each."""
    task = {"dtype": "string", "shape": [1], "names": None}, lambda e, f: f"do {e} {f} " + "x" * 40
    dataset = Dataset(
        lengths=(12, 10, 14, 11, 9, 13),
        cameras={"observation.images.front": Camera(gop=4, episodes_per_file=1)},
        columns={**DEFAULT_COLUMNS, "instruction": task},
        episodes_per_data_file=1,
    )
    return write(tmp_path_factory.mktemp("healthy") / "set", dataset)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])


def flip(path):
    """Bits all over the middle of the file, its first bytes and its footer left whole."""
    raw = bytearray(path.read_bytes())
    for place in range(len(raw) // 8, len(raw) * 5 // 8, 23):
        raw[place] ^= 0x41
    path.write_bytes(raw)


DAMAGE = {
    "truncated mp4": ("videos/observation.images.front/chunk-000/file-003.mp4", truncate),
    "missing mp4": ("videos/observation.images.front/chunk-000/file-003.mp4", lambda p: p.unlink()),
    "missing rows": ("data/chunk-000/file-003.parquet", lambda p: p.unlink()),
    "truncated rows": ("data/chunk-000/file-003.parquet", truncate),
    "bit flips in rows": ("data/chunk-000/file-003.parquet", flip),
    "bit flips in mp4": ("videos/observation.images.front/chunk-000/file-003.mp4", flip),
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", by_day(DAMAGE, "truncated rows", "bit flips in mp4"))
def test_windows_of_a_damaged_file_are_replaced_alike_on_every_topology(damage, healthy, tmp_path):
    """Damaged after the start, as files are on a failing disk: the statistics have been read, the workers hit it."""
    root = shutil.copytree(healthy, tmp_path / "set")
    overrides = [f"data.sources.main.root={root}", "~data.sources.old", "data.sources.main.val_split_ratio=0.2"]
    found = mixture(tmp_path, *overrides, "data.sources.main.prompt_columns=[instruction]", "data.chunk_length=2")
    held_out = set(found.datasets[0].source.episodes.episode_index[found.datasets[0].held_out].tolist())
    assert held_out and 3 not in held_out
    epoch = found.draws[0] // BATCH
    whole, none = collect(found, tmp_path, last=epoch)
    assert not none
    name, harm = DAMAGE[damage]
    harm(root / name)
    samples, quarantine = collect(found, tmp_path, last=epoch)
    assert quarantine and {row[1] for row in quarantine} == {3} and len(samples) == len(whole)
    assert all(str(root) in row[4] for row in quarantine)  # the cause names the file
    for sample, wanted in zip(samples, whole):
        episode = json.loads(sample[0])[2]
        assert episode not in held_out
        if json.loads(wanted[0])[2] != 3:
            assert sample == wanted  # healthy windows are untouched
    assert collect(found, tmp_path, last=epoch) == (samples, quarantine)
    assert collect(found, tmp_path, size=2, workers=3, last=epoch) == (samples, quarantine)
    assert collect(found, tmp_path, size=4, workers=1, last=epoch) == (samples, quarantine)


@pytest.mark.slow
def test_workers_that_are_new_processes_read_what_forks_read(tmp_path):
    """As cards' decoders need them; a validation's plan is chosen for them while they live."""
    found = mixture(tmp_path)
    plan = TrainPlan(found.tape(BATCH), 0, 1, 0, 6)
    shards = ShardDataset(found, plan, train=True, quarantine=tmp_path / "quarantine.jsonl")
    read = {afresh: [content(s.batch) for s in one_pass(shards, 2, 2, afresh=afresh)] for afresh in (False, True)}
    assert len(read[False]) == 12 and read[True] == read[False]
    number, told = SharedNumber(), []
    with closing(passes(Told(number), 1, 2, afresh=True)) as items:
        for number.value in (3, 2**40):
            told += [next(items), next(items)]
    assert told == [3, None, 2**40, None]


class Told(IterableDataset):
    """Yields the number that is set when a pass begins."""

    def __init__(self, number):
        self.number = number

    def __iter__(self):
        yield self.number.value


@pytest.mark.parametrize(
    ("workers", "remedy"), [(0, "set data.num_workers=2"), pytest.param(1, "set it to cpu", marks=pytest.mark.slow)]
)
def test_a_decoder_on_a_card_that_there_is_not_ends_the_run_with_the_remedy(workers, remedy, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one: tests/cuda has what it decodes")
    words = [*TOY, f"data.num_workers={workers}", "data.video_decoder=nvdec", f"paths.run_dir={tmp_path / 'run'}"]
    done = run(words)
    assert done.returncode == EXIT_USER
    assert "data.video_decoder=nvdec" in done.stderr and remedy in done.stderr


def test_rows_damaged_before_the_start_are_an_error_that_names_the_file(healthy, tmp_path):
    root = shutil.copytree(healthy, tmp_path / "set")
    truncate(root / "data/chunk-000/file-002.parquet")
    with pytest.raises(UserError, match=r"file-002\.parquet"):
        mixture(tmp_path, f"data.sources.main.root={root}", "~data.sources.old")
