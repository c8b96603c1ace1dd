"""The kinds of sources that the linter is measured on: declared rightly, or with one thing planted wrongly."""

from __future__ import annotations

from typing import Any

from support.case import Case
from support.spoilt import (
    cameras,
    copied,
    flipped,
    moved_real_part,
    no_rotations,
    one_in_degrees,
    real_part_positive,
    resting,
    rolled,
    swapped_cameras,
)

POSE: dict[str, Any] = {"space": "pose"}
CLOSED: dict[str, Any] = {"open_is_high": False, "state_range": (0.0, 0.08), "action_range": (-1.0, 1.0)}
HANDS = "gripper between sources"
HELD, NEVER = {"meets": 0.7}, "nothing held"
FORWARD = {"forward": True, "down": False}
IN_BASE = {"reference": "command_delta", "frame": "base"}
IN_TOOL = {"reference": "command_delta", "frame": "tool"}
EULER = {
    "hand down": {},
    "hand forward": FORWARD,
    "with steps of the tool": IN_TOOL,
    "with steps of the base": IN_BASE,
    "beside quaternions": {"action_rotation": "xyzw"},
}
LIKE_NUMBERS = {
    "xyz": ("hand down", "hand forward", "with steps of the base"),
    "zyx": ("hand down",),
}
"""Where the angles' own course, and the steps, are as good in the other order: of a hand that turns about the base's x
axis, whose steps are differences of its angles."""
STILL = {"up, still": {"turn": 0.05}}
ORDER: dict[str, Any] = {"asked": "state[1].rotation"}
CASES = (
    Case("clean: joints, commands"),
    Case("clean: joints, next states", {"reference": "next"}),
    Case("clean: joints, differences", {"reference": "state_delta"}),
    Case("clean: joints, scaled differences", {"reference": "scaled_delta"}),
    Case("clean: joints, degrees, gripper closed at 1", {"unit": "deg", **CLOSED}),
    Case("clean: joints, gripper's command inverted", {"command_is_inverted": True}),
    Case("clean: poses, quaternions x y z w", POSE, change=cameras),
    Case("clean: poses, quaternions w x y z, upright", {**POSE, "rotation": "wxyz", "down": False}),
    Case("clean: poses, Euler angles", {**POSE, "rotation": "euler"}),
    Case("clean: poses, axis and angle", {**POSE, "rotation": "axis_angle"}),
    Case("clean: poses, Euler angles z y x, hand forward", {**POSE, "rotation": "euler_zyx", **FORWARD}),
    Case("clean: poses, rot6d, differences", {**POSE, "rotation": "rot6d", "reference": "command_delta"}),
    Case("clean: poses, steps in the base's axes", {**POSE, **IN_BASE}),
    Case("clean: poses, steps in the tool's axes", {**POSE, **IN_TOOL, "rotation": "euler_zyx"}),
    Case("clean: nothing held, hands begin closed", {"meets": 0.0, "begins_closed": True}),
    Case("clean: a hand that turns about the base's x axis", POSE, change=rolled),
    Case("absolute, declared a delta", {}, {"actions[0].reference": "delta_step"}, asked="actions[0].reference"),
    Case(
        "next states, declared a delta",
        {"reference": "next"},
        {"actions[0].reference": "delta_start"},
        asked="actions[0].reference",
    ),
    Case(
        "difference of commands, declared absolute",
        {"reference": "command_delta"},
        {"actions[0].reference": "absolute"},
        asked="actions[0].reference",
    ),
    Case(
        "scaled difference, declared absolute",
        {"reference": "scaled_delta"},
        {"actions[0].reference": "absolute"},
        asked="actions[0].reference",
    ),
    Case(
        "positions' difference, declared absolute",
        {**POSE, "reference": "state_delta"},
        {"actions[0].reference": "absolute"},
        asked="actions[0].reference",
    ),
    Case("degrees, declared radians", {"unit": "deg"}, {"state[0].unit": "rad"}, asked="state[0].unit"),
    Case("radians, declared degrees", {}, {"actions[0].unit": "deg"}, asked="actions[0].unit"),
    Case("one joint in degrees", change=one_in_degrees, asked="state[0].unit"),
    Case(
        "degrees' differences, declared radians",
        {"unit": "deg", "reference": "state_delta"},
        {"actions[0].unit": "rad"},
        asked="actions[0].unit",
    ),
    Case("metres, declared millimetres", POSE, {"state[0].unit": "mm"}, asked="state[0].unit"),
    *(
        Case(
            f"gripper inverted{where}, {held}",
            {**arm, **({"meets": 0.0} if held == NEVER else HELD)},
            {"state[1].polarity": wrong, "actions[1].polarity": wrong},
            asked="state[1].polarity",
            best="doubt" if held == NEVER else None,
        )
        for where, arm, wrong in (("", {}, "closed"), (", closed at 1", CLOSED, "open"))
        for held in ("objects held", NEVER)
    ),
    Case(
        "gripper's command inverted",
        {"command_is_inverted": True},
        {"actions[1].polarity": "open"},
        asked="gripper direction",
    ),
    Case("gripper in [-1, 1], declared [0, 1]", CLOSED, {"actions[1].range": (0.0, 1.0)}, asked="actions[1].range"),
    Case("gripper in [0, 1], declared [0, 100]", {}, {"state[1].range": (0.0, 100.0)}, asked="state[1].range"),
    *(
        Case(
            f"{found}, declared {told}, hand {'down' if down else 'up'}",
            {**POSE, "rotation": found, "down": down},
            {"state[1].rotation": f"quat_{told}", "actions[1].rotation": f"quat_{told}"},
            asked="state[1].rotation",
            best="doubt" if down == (found == "xyzw") else None,  # turning about the base's x axis, in the other order
        )
        for found, told in (("xyzw", "wxyz"), ("wxyz", "xyzw"))
        for down in (True, False)
    ),
    Case(
        "xyzw, w >= 0, declared wxyz",
        POSE,
        {"state[1].rotation": "quat_wxyz"},
        real_part_positive,
        asked="state[1].rotation",
    ),
    Case("xyzw of the state, wxyz of the actions", POSE, {}, moved_real_part, asked="quaternion order"),
    *(
        Case(
            f"{found}, declared {told}, hand {way}, with steps",
            {**POSE, "rotation": found, "down": way == "down", **IN_BASE},
            {"state[1].rotation": f"quat_{told}"},
            **ORDER,
        )
        for found, told, way in (("xyzw", "wxyz", "down"), ("wxyz", "xyzw", "up"))
    ),
    Case("no quaternions, declared so", POSE, {}, no_rotations, asked="state[1].rotation"),
    Case(
        "axis and angle, declared Euler angles",
        {**POSE, "rotation": "axis_angle"},
        {"state[1].rotation": "euler_xyz"},
        asked="state[1].rotation",
    ),
    Case(
        "Euler angles, declared axis and angle",
        {**POSE, "rotation": "euler"},
        {"state[1].rotation": "axis_angle"},
        asked="state[1].rotation",
    ),
    *(
        Case(
            f"Euler angles {found}, declared {told}, {how}",
            {**POSE, "rotation": f"euler{form}", **arm},
            {"state[1].rotation": f"euler_{told}"},
            **ORDER,
            best="doubt" if how in LIKE_NUMBERS[found] else None,
        )
        for how, arm in EULER.items()
        for found, told, form in (("xyz", "zyx", ""), ("zyx", "xyz", "_zyx"))
    ),
    *(
        Case(
            f"{vector}' axes: {found}, declared {told}, hand {way}",
            {**POSE, "reference": "command_delta", "frame": found, "down": way == "down", **STILL.get(way, {})},
            {"actions[0].frame": told, "actions[1].frame": told},
            asked=f"actions[{place}].frame",
            best="unknown"
            if way == "up, still" or (place == 1 and way == "up")
            else None,  # the axes are nearly the same
        )
        for place, vector in enumerate(("positions", "turns"))
        for found, told in (("base", "tool"), ("tool", "base"))
        for way in ("down", "up", "up, still")
    ),
    Case("rows 10 % faster than the rate", {"clock": 1 / 1.1}, asked="rate"),
    Case("rows 4 % slower than the rate", {"clock": 1.04}, asked="rate"),
    Case("cameras swapped in some episodes", {}, {}, swapped_cameras, asked="cameras left, right"),
    Case("quaternions of mixed sign", POSE, {}, flipped, asked="quaternion sign", told="mixed sign"),
    Case("2 % of the actions' span cut off at each end", {"limit": 0.02}, asked="limits", told="clipped"),
    Case("three seconds of rest in each episode", {}, {}, resting, asked="motion", told="idle"),
    Case("an episode twice", {}, {}, copied, asked="duplicates", told="copies"),
    *(
        Case(
            f"two sources, gripper inverted in one, {held}",
            {"meets": 0.0} if held == NEVER else HELD,
            told="inverted",
            beside={**CLOSED, **({"meets": 0.0} if held == NEVER else HELD)},
            asked=HANDS,
            is_silent=True,
            best="doubt" if held == NEVER else None,
        )
        for held in ("objects held", NEVER)
    ),
    Case(
        "two sources, alike", told="inverted", beside={"reference": "next"}, asked=HANDS, is_silent=True, best="unknown"
    ),
    Case(
        "two sources, xyzw and wxyz, declared alike",
        POSE,
        {"state[1].rotation": "quat_xyzw"},
        beside={**POSE, "rotation": "wxyz"},
        asked="quaternion order",
    ),
    Case("two sources, xyzw, declared so", POSE, beside=POSE, asked="quaternion order", best="agree"),
    Case("actions 2 frames early", {"reference": "next", "shift": -2}, asked="lag", told="3"),
    Case("actions 2 frames late", {"reference": "next", "shift": 2}, asked="lag", told="-1"),
)
