"""What TensorBoard opens on, read back by TensorBoard's own reader."""

from __future__ import annotations

import re

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from opentau_train.sinks.layout import GUIDE, place_of
from opentau_train.sinks.tensorboard import TensorBoardSink

TRAINING = {
    "Training/Loss": 1.0,
    "Training/MSE": 0.5,
    "Training/VISION_MSE": 0.5,
    "Training/droid/joint/MSE": 0.5,
    "Training/GradNorm": 2.0,
    "Training/LearningRate": 1e-3,
    "Training/SamplesPerSecond": 50.0,
    "Timing/Step": 0.1,
    "Timing/DataWait": 0.01,
    "Training/SkippedSteps": 0.0,
    "Training/BatchId": 7.0,
}
PASS = {
    "Validation/Loss": 1.5,
    "Validation/droid/joint/MSE": 0.7,
    "Validation/droid/joint/MSE/N": 40.0,
    "Validation/droid/joint/MSE/StdErr": 0.1,
    "Validation/droid/joint/VISION_MSE": 0.7,
    "Validation-Action/droid/joint/joint_0/MAE_rad": 0.1,
    "Validation-Action/droid/joint/gripper/Agreement": 0.9,
    "Validation-Action/droid/joint/MAE_rad": 0.1,
    "Validation-Action/droid/joint/MAE_rad/First": 0.1,
    "Validation-Action/droid/joint/MAE_rad/Last": 0.1,
}
PREFIXES = {"counts", "dimensions", "errors", "ids", "machine"}


def read_back(make_context, tmp_path, *rows: dict[str, float]) -> tuple[dict[str, dict[str, list[str]]], list[str]]:
    """({category: {chart: the tags that it shows}}, all tags) of a run with these rows."""
    sink = TensorBoardSink(context=make_context())
    for step, row in enumerate(rows, start=1):
        sink.write(step, row)
    sink.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0}).Reload()
    tags = events.Tags()["scalars"]
    (event,) = events.Tensors("custom_scalars__config__")
    charts = {
        category.title: {
            chart.title: [tag for tag in tags if any(re.search(pattern, tag) for pattern in chart.multiline.tag)]
            for chart in category.chart
        }
        for category in Layout.FromString(event.tensor_proto.string_val[0]).category
    }
    return charts, tags


def test_charts_show_losses_held_out_losses_by_group_the_optimisation_and_the_speed(make_context, tmp_path):
    charts, tags = read_back(make_context, tmp_path, TRAINING, PASS, TRAINING)
    assert all(shown for category in charts.values() for shown in category.values()), "a chart is empty"
    assert charts["Losses"]["held out"] == ["Validation/Loss"] and charts["Losses"]["training"] == ["Training/Loss"]
    assert charts["Held-out losses by group"] == {
        "MSE": ["Validation/droid/joint/MSE"],
        "VISION_MSE": ["Validation/droid/joint/VISION_MSE"],
    }
    assert charts["Action errors"] == {"mean error of a group, by unit": ["Validation-Action/droid/joint/MAE_rad"]}
    assert charts["Optimisation"] == {
        "gradient norm": ["Training/GradNorm"],
        "learning rate": ["Training/LearningRate"],
    }
    assert charts["Speed"]["seconds a step, and without data"] == ["machine/Timing/Step", "machine/Timing/DataWait"]
    assert len(tags) == len(TRAINING | PASS)


def test_counts_ids_errors_and_single_dimensions_stand_under_prefixes_of_their_own():
    row = TRAINING | PASS
    moved = {tag: place_of(tag, row) for tag in row if place_of(tag, row) != tag}
    assert moved == {
        "Training/SkippedSteps": "counts/Training/SkippedSteps",
        "Timing/Step": "machine/Timing/Step",
        "Timing/DataWait": "machine/Timing/DataWait",
        "Training/BatchId": "ids/Training/BatchId",
        "Validation/droid/joint/MSE/N": "counts/Validation/droid/joint/MSE",
        "Validation/droid/joint/MSE/StdErr": "errors/Validation/droid/joint/MSE",
        "Validation-Action/droid/joint/joint_0/MAE_rad": "dimensions/Validation-Action/droid/joint/joint_0/MAE_rad",
        "Validation-Action/droid/joint/gripper/Agreement": "dimensions/Validation-Action/droid/joint/gripper/Agreement",
    }
    assert {place.partition("/")[0] for place in moved.values()} == PREFIXES
    assert all(f"`{prefix}/`" in GUIDE for prefix in PREFIXES) and min(PREFIXES) > "Validation"
