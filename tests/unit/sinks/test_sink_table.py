"""The table of a validation pass."""

from __future__ import annotations

import math

import pytest

from opentau_train.sinks.table import headline, read_scores, table

PASS = {
    "Validation/droid/joint/MSE": 0.25,
    "Validation/droid/joint/MSE/N": 40.0,
    "Validation/droid/joint/MSE/StdErr": 0.01,
    "Validation/lab/arm/ee/CE": 2.0,
    "Validation/lab/arm/ee/CE/N": 8.0,
    "Validation/MSE": 0.25,
    "Validation/Loss": 0.45,
}
ACTIONS = {
    "Validation-Action/droid/joint/joint_0/MAE_rad": 0.1,
    "Validation-Action/droid/joint/gripper/MAE_gripper": 0.3,
    "Validation-Action/droid/joint/gripper/Agreement": 0.875,
    "Validation-Action/droid/joint/MAE_rad": 0.1,
    "Validation-Action/droid/joint/MAE_rad/First": 0.05,
    "Validation-Action/droid/joint/MAE_rad/Last": 0.2,
    "Validation-Action/lab/arm/ee/MAE_m": 0.012,
    "Validation-Action/lab/arm/ee/MAE_m/First": 0.01,
}


def cells(text: str) -> dict[str, list[str]]:
    """{first cell: the others} of the lines, blocks joined."""
    lines: dict[str, list[str]] = {}
    for line in text.splitlines():
        first, *others = line.replace("by chance", "chance").split()
        lines.setdefault(first, []).extend(others)
    return lines


def test_a_group_has_one_line_and_the_mixture_the_last():
    lines = cells(table(PASS))
    assert list(lines) == ["group", "droid/joint", "lab/arm/ee", "mixture"]
    assert lines["droid/joint"] == ["40", "0.2500±0.010"] and lines["lab/arm/ee"] == ["8", "2.000"]


def test_columns_are_right_aligned_under_their_titles():
    header, *lines = table(PASS, PASS).splitlines()
    for title in ("N", "MSE", "change", "CE"):
        end = header.index(title) + len(title)
        assert all(not line[end:].startswith(tuple("0123456789.±")) for line in lines)
    assert lines[0].index("0.2500±0.010") + 12 == header.index("MSE") + 3


def test_change_has_the_paired_error_where_it_is_known_and_none_is_made_up():
    now = {**PASS, "Validation/droid/joint/MSE": 0.2, "Validation/lab/arm/ee/CE": 2.5}
    changes = {"Validation/droid/joint/MSE": -0.0513, "Validation/droid/joint/MSE/StdErr": 0.0123}
    lines = cells(table(now, PASS, changes))
    assert lines["droid/joint"][-1] == "-0.051±0.012" and lines["lab/arm/ee"][-1] == "+0.500"
    assert "change" not in table(now), "the first pass has nothing to compare with"
    assert "change" not in table(now, {**dict.fromkeys(PASS), "step": 1}), "what wasn't finite has no difference"


def test_the_loss_of_the_mixture_is_the_headline_with_its_change():
    assert headline(PASS) == "loss 0.4500" and headline(ACTIONS) == "" and "Loss" not in table(PASS)
    changes = {"Validation/Loss": -0.031, "Validation/Loss/StdErr": 0.0171}
    assert headline(PASS, PASS, changes) == "loss 0.4500, change -0.031±0.017"


def test_no_change_is_told_to_more_than_five_places():
    tag = "Validation/droid/joint/MSE"
    lines = cells(table(PASS, PASS, {tag: -3.77e-7, f"{tag}/StdErr": 6.2e-9}))
    assert lines["droid/joint"][-1] == "-0.00000±0.00000"


def test_cross_entropy_stands_above_what_guessing_costs():
    lines = cells(table(PASS, chance={"CE": math.log(256), "OTHER": 1.0}))
    assert lines["chance"] == ["5.545"]
    alone = {k: v for k, v in PASS.items() if "/CE" not in k}
    assert "chance" not in table(alone, chance={"CE": math.log(256)})


def test_action_errors_stand_by_unit_and_grippers_by_agreement():
    text = table({**PASS, **ACTIONS}, {**PASS, **ACTIONS, "Validation-Action/droid/joint/MAE_rad": 0.15}, width=400)
    header, droid, lab, *_ = text.splitlines()
    assert header.endswith("error, rad   change  gripper agrees    change  error, m    change")
    assert droid.split()[-4:] == ["0.1000", "-0.0500", "87.5%", "+0.00000"] and lab.split()[-2] == "0.01200"
    assert "0.3000" not in text, "a gripper's mean error says less than its agreement"


def test_actions_alone_have_a_table():
    assert [line.split()[0] for line in table(ACTIONS).splitlines()] == ["group", "droid/joint", "lab/arm/ee"]


@pytest.mark.parametrize("width", [60, 80, 110])
def test_what_does_not_fit_stands_below_beside_the_names_again(width):
    names = ["droid_100/joint_position", "bridge_v2/end_effector"]
    row = {}
    for name in names:
        for term in ("MSE", "CE"):
            tag = f"Validation/{name}/{term}"
            row |= {tag: 0.12345, f"{tag}/N": 12345.0, f"{tag}/StdErr": 0.0123}
        row |= {f"Validation-Action/{name}/MAE_{u}": 0.1 for u in ("rad", "m")}
        row |= {f"Validation-Action/{name}/MAE_{u}/First": 0.1 for u in ("rad", "m")}
    changes = {tag: value / 9 for tag, value in row.items() if not tag.endswith("/N")}
    text = table(row, row, changes, width=width)
    assert max(map(len, text.splitlines())) <= width
    found = cells(text)
    assert found.keys() == {"group", *names} and len(text.splitlines()) % 3 == 0
    assert found[names[0]] == cells(table(row, row, changes, width=1000))[names[0]]


def test_a_norm_head_has_a_line_only_where_its_numbers_are_no_groups():
    alone = {"Validation/a/joint/MSE": 0.5, "Validation/a/joint/MSE/N": 4.0}
    same = {"Validation/arm::joint/MSE": 0.5, "Validation/arm::joint/MSE/N": 4.0}
    other = {"Validation/b/joint/MSE": 0.3, "Validation/b/joint/MSE/N": 4.0, "Validation/arm::joint/MSE": 0.4}
    assert "arm::joint" not in table(alone | same)
    assert "arm::joint" in table(alone | same | other)


def test_scores_keep_dataset_names_with_slashes():
    assert [(s.group, s.term, s.num) for s in read_scores({**PASS, **ACTIONS, "Training/Loss": 1.0})] == [
        ("droid/joint", "MSE", 40.0),
        ("lab/arm/ee", "CE", 8.0),
        ("", "MSE", None),
        ("", "Loss", None),
    ]
