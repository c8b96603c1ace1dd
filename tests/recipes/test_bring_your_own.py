"""Any LeRobot dataset trains with no configuration but its place."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.lerobot_writer import AV1, HEVC_B, Camera, Dataset, vector, write
from tests.nightly import by_day
from tests.program import TINY_POLICY, metrics, train_here

QUICK = [*TINY_POLICY, "trainer.steps=2", "trainer.global_batch_size=4", "trainer.log_every=1", "data.num_workers=0"]
QUICK += ["validation.every=2", "data.sources.main.val_split_ratio=0.3", "logger=none"]

TEXT = {"dtype": "string", "shape": [1], "names": None}
FRONT, WRIST = "observation.images.front", "observation.images.wrist"

KINDS = {
    "no images": Dataset(cameras={}),
    "one camera, v2.1": Dataset(version="v2.1"),
    "cameras of different sizes and codecs": Dataset(
        cameras={FRONT: Camera(size=(64, 96)), WRIST: Camera("libsvtav1", (80, 64), options=AV1)}
    ),
    "hevc, 50 fps, files of one episode": Dataset(
        fps=50, episodes_per_data_file=1, cameras={FRONT: Camera("libx265", options=HEVC_B, episodes_per_file=1)}
    ),
    "images in parquet": Dataset(cameras={FRONT: Camera(None)}),
    "images in parquet, v2.1": Dataset(version="v2.1", cameras={FRONT: Camera(None)}),
    "state in several columns": Dataset(
        columns={"observation.state.arm": vector(5), "observation.state.hand": vector(1, 0.25), "action": vector(2)}
    ),
    "one-dimensional action, no state": Dataset(columns={"action": vector(1)}, cameras={}),
    "episodes shorter than a chunk": Dataset(lengths=(3, 2, 5, 4)),
}
BY_DAY = [kind for kind in KINDS if kind not in ("no images", "images in parquet, v2.1", "state in several columns")]


@pytest.mark.parametrize("kind", by_day(KINDS, *BY_DAY))
def test_trains_validates_and_saves_without_configuration(kind, tmp_path):
    root = tmp_path / "data"
    write(root, KINDS[kind])
    run = train_here(["+recipe=lerobot", f"data.sources.main.root={root}", *QUICK], tmp_path / "run")
    rows = metrics(run)
    assert sorted(rows) == [1, 2]
    assert all(np.isfinite(rows[step]["Training/Loss"]) for step in rows)
    assert np.isfinite(rows[2]["Validation/MSE"])
    assert (run / "checkpoints" / "last" / "pretrained_model" / "model.safetensors").is_file()


@pytest.mark.parametrize("texts", [["", ""], [None, None]], ids=["empty", "null"])
def test_a_dataset_without_task_texts_trains(texts, tmp_path):
    root = write(tmp_path / "data", KINDS["no images"])
    tasks = pa.table({"task_index": [0, 1], "task": pa.array(texts, pa.string())})
    pq.write_table(tasks, root / "meta" / "tasks.parquet")
    rows = metrics(train_here(["+recipe=lerobot", f"data.sources.main.root={root}", *QUICK], tmp_path / "run"))
    assert np.isfinite(rows[2]["Validation/MSE"])


def test_a_dataset_whose_rows_name_no_task_trains(tmp_path):
    root = write(tmp_path / "data", KINDS["no images"])
    info = json.loads((root / "meta" / "info.json").read_text())
    del info["features"]["task_index"]
    (root / "meta" / "info.json").write_text(json.dumps(info))
    rows = metrics(train_here(["+recipe=lerobot", f"data.sources.main.root={root}", *QUICK], tmp_path / "run"))
    assert np.isfinite(rows[2]["Validation/MSE"])


def test_a_mixture_of_two_different_datasets_trains(tmp_path):
    write(tmp_path / "a", KINDS["no images"])
    write(tmp_path / "b", KINDS["cameras of different sizes and codecs"])
    mixture = [f"data.sources.main.root={tmp_path / 'a'}", f"data.sources.other.root={tmp_path / 'b'}"]
    mixture += ["data.sources.main.robot_type=a", "data.sources.main.weight=1", "data.sources.other.weight=3"]
    mixture += ["data.sources.other.val_split_ratio=0.3"]
    rows = metrics(train_here(["+recipe=lerobot", *mixture, *QUICK], tmp_path / "run"))
    assert {"Validation/main/default/MSE", "Validation/other/default/MSE"} <= rows[2].keys()


@pytest.mark.slow
def test_the_cosmos_schema_of_droid_trains(tmp_path):
    cameras = ("wrist_image_left", "exterior_image_1_left", "exterior_image_2_left")
    columns = {
        "observation.state.cartesian_position": vector(6),
        "observation.state.joint_positions": vector(7),
        "observation.state.gripper_position": vector(1),
        "action.joint_position": vector(7),
        "action.gripper_position": vector(1),
    }
    write(tmp_path / "data", Dataset(cameras={f"observation.image.{c}": Camera() for c in cameras}, columns=columns))
    quick = [o.replace("sources.main", "sources.droid") for o in QUICK]
    source = ["data=droid_cosmos", f"data.sources.droid.root={tmp_path / 'data'}"]
    rows = metrics(train_here([*source, *quick], tmp_path / "run"))
    assert np.isfinite(rows[2]["Validation/droid/joint/MSE"])
