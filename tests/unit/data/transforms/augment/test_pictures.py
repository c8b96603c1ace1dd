"""Augmented pictures: numbers keyed by sample, drawn once for a window, and none of them outside training."""

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from opentau_train.checkpoints.pretrained import load_policy
from opentau_train.config.typed import instantiate
from opentau_train.data.batch import stack
from opentau_train.data.decode.images import Resizer
from opentau_train.data.load.samples import SampleBuilder
from opentau_train.data.transforms.augment.pictures import Augment
from opentau_train.data.transforms.augment.pixels import OPERATIONS, Box
from opentau_train.data.transforms.base import SampleDraws
from opentau_train.data.transforms.pipeline import Pipeline
from opentau_train.errors import UserError
from opentau_train.types import Address, BatchSpec
from tests.program import TOY, metrics, train_here
from tests.unit.data.load.test_real_stream import collect, mixture
from tests.unit.data.transforms.augment.test_pixels import distance, natural, noise

ALL = {
    "crop": (0.5, 0.78),  # the middle, 0.64, is whole pixels of 45 x 80
    "aspect": (0.8, 1.25),
    "rotate": (-10.0, 10.0),
    "shift": (-0.1, 0.1),
    "brightness": (0.7, 1.3),
    "contrast": (0.6, 1.4),
    "saturation": (0.5, 1.5),
    "hue": (-0.08, 0.08),
    "sharpness": (0.5, 1.5),
    "blur": (0.5, 1.5),
    "cutout": (0.02, 0.1),
}
COLOURS = {name: ALL[name] for name in ("brightness", "contrast", "saturation", "hue", "sharpness")}
TARGET = {"_target_": "opentau_train.data.transforms.augment.Augment"}
options = st.fixed_dictionaries({}, optional={name: st.just(value) for name, value in ALL.items()})


def draws(key: int) -> SampleDraws:
    return SampleDraws(key, "augment")


def record(num_frames: int = 2, size: tuple[int, int] = (45, 80), cameras=("eye", "wrist")) -> dict:
    frame = natural(1, size)
    return {"images": {camera: np.repeat(frame[None], num_frames, axis=0) for camera in cameras}}


def drawn(number: int = 200, camera: str = "eye", **chosen) -> list:
    augment = Augment((48, 80), **chosen)
    return [augment.draw(camera, draws(key)) for key in range(number)]


@given(options, st.sampled_from(["camera", "views"]), st.integers(0, 2**62), st.integers(1, 3))
def test_frames_share_their_numbers_and_equal_keys_give_equal_bits(chosen, shared, key, num_frames):
    augment = Augment((48, 80), shared=shared, **chosen)
    samples = [augment(record(num_frames), draws(key))["images"] for _ in range(2)]
    for camera in ("eye", "wrist"):
        first, again = samples[0][camera], samples[1][camera]
        assert first.dtype == np.uint8 and first.shape == (num_frames, 45, 80, 3) and first.flags.c_contiguous
        assert first.tobytes() == again.tobytes()
        assert all(frame.tobytes() == first[0].tobytes() for frame in first)  # of one picture, hence of one drawing
    if shared == "views":
        assert samples[0]["eye"].tobytes() == samples[0]["wrist"].tobytes()
    one = augment(record(num_frames, cameras=("wrist",)), draws(key))["images"]  # the other one is missing
    assert list(one) == ["wrist"] and one["wrist"].tobytes() == samples[0]["wrist"].tobytes()


def test_cameras_samples_and_names_of_transforms_have_numbers_of_their_own():
    augment = Augment((48, 80), **ALL)
    made = {
        str(augment.draw(camera, SampleDraws(key, name)))
        for camera in ("eye", "wrist")
        for key in (1, 2)
        for name in ("augment", "other")
    }
    assert len(made) == 8


@given(st.floats(0.05, 1.0), st.floats(0.05, 1.0), st.floats(0.1, 10.0), st.floats(0.1, 10.0), st.integers(0, 2**62))
def test_a_crop_lies_inside_the_picture_and_has_a_share_of_the_range(share, other_share, aspect, other_aspect, key):
    crop, aspects = tuple(sorted((share, other_share))), tuple(sorted((aspect, other_aspect)))
    box = Augment((48, 80), crop=crop, aspect=aspects).draw("eye", draws(key)).box
    assert min(box) >= 0 and box.left + box.width <= 1 + 1e-9 and box.top + box.height <= 1 + 1e-9
    assert crop[0] - 1e-9 <= box.width * box.height <= crop[1] + 1e-9
    ratio = box.width / box.height
    assert aspects[0] - 1e-9 <= ratio <= aspects[1] + 1e-9 or max(box.width, box.height) == pytest.approx(1)


def test_numbers_fill_their_ranges_and_boxes_the_picture():
    made = drawn(400, **ALL, blur_probability=1.0, cutout_probability=1.0)
    columns = {name: [dict(d.operations)[name] for d in made] for name in OPERATIONS}
    columns |= {"rotate": [d.degrees for d in made], "shift": [x for d in made for x in d.shift]}
    columns |= {"crop": [d.box.width * d.box.height for d in made]}
    columns |= {"cutout": [d.cutout.width * d.cutout.height for d in made]}
    for name, values in columns.items():
        low, high = ALL[name]
        margin = 0.03 * (high - low)
        assert low <= min(values) < low + margin and high - margin < max(values) <= high, name
    for place, side in (("left", "width"), ("top", "height")):
        at = [getattr(d.box, place) / (1 - getattr(d.box, side)) for d in made]
        assert min(at) < 0.03 and max(at) > 0.97


def test_the_order_of_colours_is_drawn_or_the_documented_one():
    orders = {tuple(name for name, _ in d.operations) for d in drawn(**COLOURS)}
    assert len(orders) > 60  # of 120
    assert {tuple(n for n, _ in d.operations) for d in drawn(**COLOURS, random_order=False)} == {tuple(COLOURS)}


def test_only_so_many_are_made_of_a_sample_each_as_often():
    chosen = {**COLOURS, "rotate": (1.0, 2.0), "shift": (0.01, 0.02)}
    made = [({n for n, _ in d.operations} | ({"affine"} if d.degrees else set())) for d in drawn(600, only=3, **chosen)]
    assert {len(names) for names in made} == {3}
    counts = [sum(name in names for names in made) for name in (*COLOURS, "affine")]
    assert all(240 < count < 360 for count in counts), counts  # 300, give or take five standard deviations
    assert all((d.degrees != 0) == (d.shift != (0, 0)) for d in drawn(600, only=3, **chosen))


def test_blur_and_cutout_come_with_their_probabilities():
    made = drawn(600, blur=(1.0, 2.0), cutout=(0.1, 0.2), blur_probability=0.2, cutout_probability=0.7)
    assert 80 < sum(bool(d.operations) for d in made) < 160
    assert 370 < sum(d.cutout is not None for d in made) < 470


def test_fixed_cameras_keep_their_place_and_change_their_colours():
    augment = Augment((48, 80), fixed=("*wrist*",), **ALL)
    wrist = augment.draw("left_wrist", draws(3))
    assert wrist.box == Box() and not wrist.degrees and wrist.shift == (0, 0) and wrist.operations
    assert augment.draw("eye", draws(3)).box != Box()
    seen = augment.evaluate(record(), draws(3))["images"]
    assert np.array_equal(seen["wrist"], record()["images"]["wrist"])
    assert not np.array_equal(seen["eye"], record()["images"]["eye"])


@given(options, st.integers(0, 2**62))
def test_validation_and_robots_see_the_middle_and_nothing_random(chosen, key):
    augment = Augment((48, 80), **chosen)
    spec = BatchSpec(("eye", "wrist"), (48, 80), 1, 0, 0, 1, ("arm::joint",))
    pipeline = Pipeline({"augment": augment})
    seen = [pipeline(record(), k, training=False)["images"]["eye"] for k in (key, 7)]
    assert seen[0].tobytes() == seen[1].tobytes()
    share = sum(chosen.get("crop", (1.0, 1.0))) / 2
    rows, columns = round(45 * share**0.5), round(80 * share**0.5)
    top, left = round((45 - rows) / 2), round((80 - columns) / 2)
    middle = record()["images"]["eye"][0][top : top + rows, left : left + columns]
    reference = Image.fromarray(middle).resize((80, 45), Image.Resampling.BILINEAR)
    assert np.median(distance(seen[0][0], reference)) <= 2
    observed = pipeline.observe([{"images": {"eye": record()["images"]["eye"]}}], "arm::joint", spec)
    assert observed.images["eye"].shape == (1, 2, 3, 48, 80) and observed.camera_mask["wrist"].tolist() == [False]
    assert observed.images["eye"].movedim(2, -1).is_contiguous()
    assert np.array_equal(observed.images["eye"][0].movedim(1, -1).numpy()[:, 1:46], seen[0])


def test_a_robot_may_give_pictures_as_large_as_training_read_them():
    pipeline = Pipeline({"augment": Augment((48, 80), crop=(0.64, 0.64))})
    spec = BatchSpec(("eye",), (48, 80), 0, 0, 0, 1, ("arm::joint",))
    assert pipeline.picture_size((48, 80)) == (60, 100)
    batch = pipeline.observe([{"images": {"eye": natural(1, (60, 100))}}], "arm::joint", spec)
    assert np.array_equal(batch.images["eye"][0, 0].movedim(0, -1).numpy(), natural(1, (60, 100))[6:54, 10:90])
    with pytest.raises(UserError) as caught:
        pipeline.observe([{"images": {"eye": natural(1, (61, 100))}}], "arm::joint", spec)
    assert "H and W at most [60, 100]" in caught.value.remedy


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"crop": [0.9, 0.8]}, "augment.crop must be two rising numbers from 0.001 to 1"),
        ({"crop": [0.0, 0.8]}, "augment.crop must be"),
        ({"brightness": [-1.0, 1.0]}, "augment.brightness must be two rising numbers from 0 to 10"),
        ({"hue": [-0.6, 0.5]}, "augment.hue must be"),
        ({"centre": 1.5}, "augment.centre must be a number from 0.001 to 1, got 1.5"),
        ({"blur_probability": 2.0}, "augment.blur_probability must be a number from 0 to 1"),
        ({"only": 0}, "augment.only must be at least 1"),
        ({"colour": [0.5, 1.0]}, "unknown key 'augment.colour'"),
    ],
)
def test_options_out_of_range_are_refused(options, expected):
    with pytest.raises(UserError, match=r".") as caught:
        instantiate({**TARGET, "size": [48, 80], **options}, "augment")
    assert caught.value.what.startswith(expected) and caught.value.remedy


@pytest.mark.parametrize("preset", ["droid_cosmos", "openpi", "lerobot"])
def test_presets_augment_training_alone_and_fill_the_batch(preset, tmp_path):
    plain, opened = mixture(tmp_path), mixture(tmp_path, f"data/augment={preset}")
    for training in (True, False):
        builders = [SampleBuilder(m, training=training) for m in (plain, opened)]
        seen = [stack([b.build(0, Address(0, 0, 3, 0))], plain.spec).images for b in builders]
        for camera, pictures in seen[0].items():
            assert pictures.shape == seen[1][camera].shape and seen[1][camera].any()
            if training:
                assert not torch.equal(pictures, seen[1][camera])
            elif preset != "droid_cosmos":  # whole: read larger and scaled
                assert (pictures.float() - seen[1][camera].float()).abs().mean() < 12
            else:
                assert torch.equal(pictures, seen[1][camera]) == (preset == "lerobot")
        for builder in builders:
            builder.close()


@pytest.mark.slow
def test_a_run_trains_validates_and_its_policy_on_a_robot_crops_as_validation_did(tmp_path):
    words = [*TOY, "data/augment=droid_cosmos", "trainer.steps=2", "validation.every=2", "data.history=1"]
    run = train_here(words, tmp_path / "run")
    assert np.isfinite(metrics(run)[2]["Validation/Loss"])
    loaded = load_policy(run)
    head, pipeline = next(iter(loaded.pipelines.items()))
    augment = pipeline.transforms["augment"]
    assert isinstance(augment, Augment) and augment.size == (32, 32) and augment.shared == "views" and augment.crops
    camera, picture = loaded.spec.cameras[0], natural(1, (34, 34))
    state = np.zeros(len(loaded.stats[head].state_names), np.float32)
    batch = loaded.observe([{"images": {camera: picture}, "state": state, "prompt": "go"}], head)
    wanted = augment.evaluate({"images": {camera: picture[None]}}, draws(0))["images"][camera][0]
    assert np.array_equal(batch.images[camera][0, 1].movedim(0, -1).numpy(), wanted)


def test_any_topology_sees_the_same_augmented_pixels(tmp_path):
    opened = mixture(tmp_path, "data/augment=openpi", "data.history=1")
    whole, _ = collect(opened, tmp_path)
    assert whole != collect(mixture(tmp_path, "data.history=1"), tmp_path)[0]
    assert collect(opened, tmp_path, size=2, workers=2)[0] == whole
    assert collect(opened, tmp_path, first=3)[0] == whole[12:]


def test_each_frame_is_decoded_once_and_a_crop_is_of_more_pixels_than_the_batch_has(tmp_path):
    crop = ["data/augment=openpi", "data.transforms.augment.crop=[0.25,0.25]"]
    plain, cropped = mixture(tmp_path, "data.history=1"), mixture(tmp_path, "data.history=1", *crop)
    counts = []
    for opened in (plain, cropped):
        builder = SampleBuilder(opened, training=True)
        samples = [builder.build(0, Address(0, 0, frame, 0), ahead=5 - frame) for frame in range(6)]
        counts.append(next(iter(builder.factories.values())).frames_decoded)
        batch = stack(samples, opened.spec)
        assert {v.shape for v in batch.images.values()} == {(6, 2, 3, 32, 32)}
        builder.close()
    assert counts[0] == counts[1] > 0
    assert cropped.pipelines[0].picture_size((32, 32)) == (64, 64)


def test_a_crop_costs_no_resolution():
    """Beside a crop of the stored picture itself: nearer to it than a crop of the picture at the batch's size."""
    stored = noise(5, (180, 320))
    frame = av.VideoFrame.from_ndarray(np.asarray(Image.fromarray(stored).resize((640, 360))), "rgb24")
    augment, middle = Augment((90, 160), crop=(0.25, 0.25)), (160, 90, 480, 270)
    truth = Image.fromarray(frame.to_ndarray(format="rgb24")).crop(middle).resize((160, 90), Image.Resampling.BILINEAR)
    errors = []
    for size in ((90, 160), augment.picture_size((90, 160))):
        read = Resizer(size)(frame)[None]
        errors.append(distance(augment.evaluate({"images": {"eye": read}}, draws(0))["images"]["eye"][0], truth).mean())
    assert errors[1] < errors[0] / 3
