"""What `act` gives for the windows of a run's data is what its validation sampled, in the robot's units."""

import json
import logging
import shutil
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

from opentau_train import load_policy
from opentau_train.data.decode.images import Resizer
from opentau_train.deploy.pictures import frames_of
from opentau_train.errors import UserError
from opentau_train.tools import export
from tests.lerobot_writer import decode_all, picture
from tests.nightly import by_day
from tests.program import metrics
from tests.unit.deploy.windows import validated


@pytest.fixture(scope="module")
def seen(own_run, policy):
    return validated(own_run, policy)


def test_chunks_are_the_validations_bit_for_bit(seen, policy):
    actions = policy.act([w.seen for w in seen.windows], seed=[w.key for w in seen.windows])
    assert actions.dtype == np.float32 and actions.shape == (len(seen.windows), 8, 3) and len(seen.windows) > 8
    np.testing.assert_array_equal(actions, np.stack(seen.expected))
    for i in (0, 5):  # alone, products of matrices have another shape, and so may round otherwise
        one = policy.act(seen.windows[i].seen, seed=seen.windows[i].key)
        np.testing.assert_allclose(one, seen.expected[i], atol=1e-4 * np.abs(seen.expected[i]).max())


def test_what_the_run_logged_is_what_act_gives(seen, policy, own_run):
    actions = policy.act([w.seen for w in seen.windows], seed=[w.key for w in seen.windows])
    errors = [np.abs(a - w.raw.actions)[~w.raw.is_pad] for a, w in zip(actions, seen.windows, strict=True)]
    logged = next(v for tag, v in metrics(own_run)[1].items() if tag.endswith("/default/MAE"))
    assert np.concatenate(errors).mean() == pytest.approx(logged, rel=1e-6)


def test_pictures_of_the_stored_size_are_left_as_they_are(seen, policy, own_run):
    """Decoded by PyAV itself, with all of an episode's frames, as a camera would have given them."""
    source = own_run.parent / "set"
    (video,) = [v for v in source.rglob("*.mp4") if "file-000" in v.name or v.name.endswith("000000.mp4")][:1]
    frame = decode_all(video)[1][3].to_ndarray(format="rgb24")
    window = seen.windows[0]
    reader = policy.readers[policy.norm_heads[0]]
    read = reader.read({**window.seen, "front": np.stack([frame, frame])})
    np.testing.assert_array_equal(read["images"]["front"], np.stack([frame, frame]))
    as_read = [picture(0, 3, "observation.images.side", (64, 96))] * 2
    np.testing.assert_array_equal(reader.read({**window.seen, "side": as_read})["images"]["side"], as_read)


@pytest.mark.slow
@pytest.mark.parametrize("norm_head", by_day(["toy::default", "toy6::default"], "toy6::default"))
def test_crops_drops_and_shorter_chunks_are_the_validations_too(scaled_run, norm_head):
    policy = load_policy(scaled_run / "checkpoints" / "last", norm_head=norm_head)
    seen = validated(scaled_run, policy)
    mine = [(w, e) for w, e in zip(seen.windows, seen.expected, strict=True) if w.norm_head == norm_head]
    actions = policy.act([w.seen for w, _ in mine], seed=[w.key for w, _ in mine])
    expected = np.stack([e for _, e in mine])[:, : policy.chunk_length]
    assert policy.chunk_length == (12 if norm_head == "toy6::default" else 16) == actions.shape[1]
    assert len(mine) > 4 and policy.robot().videos
    np.testing.assert_allclose(actions, expected, atol=1e-5 * np.abs(expected).max())  # the batch had other rows, too


def test_a_column_of_the_dataset_is_taken_whole_and_by_its_names(scaled_run):
    policy = load_policy(scaled_run, norm_head="toy::default")
    assert len(policy.state_names) == 6 and "observation.state.state_2" not in policy.state_names
    assert policy.robots["toy6::default"].cameras == ("front",) and policy.cameras == ("front", "wrist")
    with pytest.raises(UserError, match="the policy reads 6 numbers"):
        policy.act({"observation.state": np.zeros(7)})
    a = policy.act({"observation.state": np.arange(6.0), "observation.images.front": np.zeros((9, 9, 3), np.uint8)})
    b = policy.act({"images": {"front": np.zeros((3, 8, 8))}, "state": list(range(6))})
    np.testing.assert_array_equal(a, b)


def test_rows_of_a_dataset_are_observations(seen, policy):
    """Floats, channels first, torch tensors, and the columns that no robot has."""
    window = seen.windows[2]
    floats = {f"observation.images.{c}": torch.from_numpy(v).movedim(-1, 1) / 255 for c, v in window.raw.images.items()}
    state = torch.from_numpy(window.raw.state)
    row = {**floats, "observation.state": state, "task": window.sample["prompt"], "action": torch.zeros(3)}
    row |= {"timestamp": 0.1, "frame_index": 3, "task_index": 0, "next.done": False, "action_is_pad": [False]}
    np.testing.assert_array_equal(policy.act(row, seed=window.key), policy.act(window.seen, seed=window.key))


def test_all_forms_of_a_policy_act_alike(seen, policy, own_run, tmp_path, monkeypatch):
    out = tmp_path / "policy.safetensors"
    assert export.main([f"checkpoint={own_run}", f"out={out}"]) == 0
    hub = tmp_path / "hub"
    snapshot = hub / "models--me--robot" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    shutil.copy(out, snapshot / "policy.safetensors")
    (hub / "models--me--robot" / "refs").mkdir()
    (hub / "models--me--robot" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (own_run / "checkpoints" / "best").unlink(missing_ok=True)
    (own_run / "checkpoints" / "best").symlink_to("00000001")
    expected = policy.act(seen.windows[0].seen)
    for path in (
        own_run / "checkpoints" / "best",
        own_run / "checkpoints" / "last" / "pretrained_model",
        out,
        "me/robot",
    ):
        np.testing.assert_array_equal(load_policy(path).act(seen.windows[0].seen), expected)
    with pytest.raises(UserError, match="no file or directory is called 'you/robot'"):
        load_policy("you/robot")


def test_one_seed_draws_alike_and_others_otherwise(seen, policy):
    one = seen.windows[0].seen
    first, same, other = policy.act([one, one, one], seed=[3, 3, -1])
    np.testing.assert_array_equal(first, same)
    assert np.abs(first - other).max() > 0.1
    np.testing.assert_array_equal(policy.act([one, one], seed=5)[0], policy.act([one, one], seed=5)[1])
    with pytest.raises(UserError, match="2 seeds for 1 observations"):
        policy.act([one], seed=[1, 2])
    with pytest.raises(UserError, match="there is no observation"):
        policy.act([])


def test_the_number_of_flow_steps_is_a_choice(seen, policy):
    one = seen.windows[0].seen
    np.testing.assert_array_equal(policy.act(one, steps=4), policy.act(one))
    assert np.abs(policy.act(one, steps=2) - policy.act(one)).max() > 1e-3
    with pytest.raises(UserError, match="steps=0 is no number of steps"):
        policy.act(one, steps=0)


def test_missing_cameras_tasks_and_frames_are_told_once(seen, own_run, caplog):
    policy = load_policy(own_run)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            policy.act({"state": seen.windows[0].raw.state, "side": np.zeros((8, 8, 3), np.uint8)})
    assert [record.message.partition(": ")[2] for record in caplog.records] == [
        "camera side gives one picture, which stands for 1 earlier ones too",
        "camera front is missing: the policy acts without it",
        "there is no task: the policy acts without one",
    ]
    batch = policy.batch([{"state": seen.windows[0].raw.state}], policy.norm_heads[0])
    assert not batch.camera_mask["front"].any() and not batch.images["side"].any()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stat": 1.0}, "the policy doesn't read 'stat': did you mean 'state'?"),
        ({"wrist": np.zeros((8, 8, 3), np.uint8)}, "the policy doesn't read 'wrist'"),
        ({"state": np.zeros(3)}, "'state' has the shape [3], the policy reads 4 numbers"),
        ({"state": np.array([0, np.nan, 0, 0])}, "there is no finite number for observation.state[1]"),
        ({"task": 3}, "'task' is int, not a text"),
        ({"state": "four numbers"}, "'state' is <U12, not numbers"),
        ({"front": np.zeros((8, 8), np.uint8)}, "camera 'front' gives uint8 [8, 8], which is no picture: its shape"),
        ({"front": np.zeros((8, 8, 3), np.int64)}, "camera 'front' gives int64 [1, 8, 8, 3], which is no picture"),
        ({"front": np.full((8, 8, 3), 255.0)}, "its range, 255 to 255"),
        ({"front": np.full((8, 8, 3), np.nan)}, "its range, nan to nan"),
        ({"front": np.zeros((3, 8, 8, 3), np.uint8)}, "camera 'front' gives 3 frames, the policy takes 2"),
        ({"observation.images.front": np.zeros((8, 8, 3), np.uint8)}, "camera 'front' is there twice"),
    ],
)
def test_what_does_not_fit_is_told_with_what_the_policy_reads(change, words, seen, policy):
    with pytest.raises(UserError) as caught:
        policy.act({**seen.windows[0].seen, **change})
    assert words in caught.value.what
    if "picture" not in words and "range" not in words:
        assert "2 frames of the cameras front, side; state: observation.state[0]" in caught.value.remedy
    with pytest.raises(UserError, match="there is no state"):
        policy.act({"front": seen.windows[0].raw.images["front"]})
    with pytest.raises(UserError, match="an observation is list"):
        policy.act([[1.0]])


def test_what_it_reads_and_gives_is_told(policy, scaled_run):
    assert policy.norm_heads == ("arm::default",) and policy.cameras == ("front", "side") and policy.history == 1
    assert policy.state_names == tuple(f"observation.state[{i}]" for i in range(4)) and policy.chunk_length == 8
    assert policy.action_names == ("action[0]", "action[1]", "action[2]") and policy.fps == 30.0
    several = load_policy(scaled_run)
    with pytest.raises(UserError, match="the policy knows several robots") as caught:
        _ = several.fps
    assert "toy::default, toy6::default" in caught.value.remedy
    assert several.for_robot("toy::default").fps == 15.0
    with pytest.raises(UserError, match=r"wasn't trained on 'toy7::default': did you mean 'toy"):
        several.act({}, norm_head="toy7::default")


def test_a_policy_of_before_acts_as_ever(own_run, policy, seen, tmp_path):
    """Its card has no entry of robots."""
    folder = tmp_path / "pretrained_model"
    shutil.copytree(own_run / "checkpoints" / "last" / "pretrained_model", folder)
    card = json.loads((folder / "policy.json").read_text())
    del card["robots"]
    (folder / "policy.json").write_text(json.dumps(card))
    before = load_policy(folder)
    assert before.robot().state_names == policy.state_names and before.fps == policy.fps
    np.testing.assert_array_equal(before.act(seen.windows[0].seen), policy.act(seen.windows[0].seen))
    card["conventions"] = {"main": {"converted": True, "declared": {}}}
    (folder / "policy.json").write_text(json.dumps(card))
    with pytest.raises(UserError, match="saved by an older version") as caught:
        load_policy(folder)
    assert "resume=auto" in caught.value.remedy


def scene(size, seed=0):
    """[H, W, 3] uint8: smooth colours with some edges, as cameras see."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (6, 8, 3), np.uint8)).resize(size[::-1], Image.Resampling.BICUBIC)
    out = np.array(coarse)
    out[size[0] // 4 : size[0] // 2, size[1] // 3 : size[1] // 2] = (200, 60, 40)
    return out


@pytest.mark.parametrize("scaling", ["area", "bilinear"])
def test_a_picture_of_one_row_and_many_columns_takes_no_more_memory_than_it_has_bytes(scaling):
    """A stranger's, through the server: nothing is made whose size is a product of the picture's and the policy's."""
    wide = np.zeros((1, 400_000, 3), np.uint8)
    wide[:, 200_000:] = 200
    tracemalloc.start()
    seen = frames_of(wide, "eye", (224, 224), halved=True, scaling=scaling)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seen.shape == (1, 1, 224, 3) and seen[0, 0, 0, 0] == 0 and seen[0, 0, -1, 0] == 200
    assert most < 10 * wide.nbytes


@pytest.mark.parametrize("size", [(90, 160), (224, 224), (61, 77)])
@pytest.mark.parametrize("halved", [True, False])
@pytest.mark.parametrize("scaling", ["area", "bilinear"])
def test_scaled_pictures_are_nearly_the_readers(size, halved, scaling):
    """The tolerance that docs/deploy.md states, of frames of a video (its colours are halved) and of stills."""
    import av

    frame = av.VideoFrame.from_ndarray(scene((240, 320)), "rgb24")
    if halved:
        frame = frame.reformat(format="yuv420p")
    read, rgb = Resizer(size, scaling)(frame).astype(int), frame.to_ndarray(format="rgb24")
    own = frames_of(rgb, "eye", size, halved=halved, scaling=scaling)[0]
    assert own.shape == read.shape
    errors = np.abs(own - read)
    assert errors.mean() < 1.3 and np.percentile(errors, 99) <= 4
    # Each treated as the other is further off, but for odd widths, whose colours libswscale keeps.
    other = np.abs(frames_of(rgb, "eye", size, halved=not halved, scaling=scaling)[0] - read)
    assert other.mean() > errors.mean() or size[1] % 2
