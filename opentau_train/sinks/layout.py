"""What TensorBoard opens on: charts of what matters, the rest under other prefixes, a text that says what to look at.

The prefixes are in lower case, so that TensorBoard lists them after those that matter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

COUNTED = ("SkippedSteps", "SubstitutedWindows", "CutPrompts", "OpenDecoders", "DistinctEpisodes", "Samples", "Windows")
ACTION = "Validation-Action/"
MACHINE = ("Timing/", "Memory/")

Layout = dict[str, dict[str, list[str]]]
"""{category: {chart: patterns of the tags in it}}"""

GUIDE = """
**What to look at**, first in the tab *Custom Scalars*:

1. *Losses*: `Validation/Loss` is the loss of held-out episodes, weighted like the mixture. It is to fall with
   `Training/Loss`; where it turns while that falls on, the policy learns its episodes by heart. The link
   `checkpoints/lowest` names the checkpoint of its lowest value.
2. *Held-out losses by group*: a (dataset, control_mode) that stays high, or rises while the others fall, is the one to
   look into.
3. *Optimisation*: a gradient norm that settles, with few peaks. `counts/Training/SkippedSteps` counts those that
   weren't finite.
4. *Speed*: seconds a step, and those of them that went by without data. Where the second is a large part, raise
   `data.num_workers`.
5. *Action errors*, with the evaluator `action`: in radians and metres, over the whole chunk.

| | |
| --- | --- |
| `Training/`, `Validation/`, `Validation-Action/` | losses and errors, of the mixture, then of each group |
| `errors/` | the standard errors of the held-out losses |
| `counts/` | windows and samples behind a number; steps skipped, windows replaced |
| `dimensions/` | action errors and agreement, dimension by dimension |
| `ids/` | which samples a step saw: equal in two runs means equal batches |
| `machine/` | what a step's seconds went to, and memory |

All of these numbers are in `metrics.jsonl`, too, under their names without the prefixes in lower case.
"""


def place_of(tag: str, row: Mapping[str, float]) -> str:
    """What TensorBoard calls the `tag` of a `row`."""
    last = tag.rpartition("/")[2]
    if tag.startswith(MACHINE):
        return f"machine/{tag}"
    if last == "StdErr":
        return f"errors/{tag.removesuffix('/StdErr')}"
    if last == "N" or last in COUNTED:
        return f"counts/{tag.removesuffix('/N')}"
    if last.endswith("Id"):
        return f"ids/{tag}"
    of_unit = f"{tag}/First" in row or last in ("First", "Last")
    return f"dimensions/{tag}" if tag.startswith(ACTION) and not of_unit else tag


def layout(row: Mapping[str, float]) -> Layout:
    """The charts of a run whose training has rows like `row`."""
    terms = [tag.partition("/")[2] for tag in row if re.fullmatch(r"Training/[A-Z0-9_]+", tag)]
    return {
        "Losses": {
            "training": ["^Training/Loss$"],
            "held out": ["^Validation/Loss$", "^Validation-EMA/Loss$"],
            **{f"{term}, training and held out": [f"^(Training|Validation)/{term}$"] for term in terms},
        },
        "Held-out losses by group": {term: [f"^Validation/.+/{term}$"] for term in terms},
        "Action errors": {"mean error of a group, by unit": [r"^Validation-Action/.+/MAE[^/]*$"]},
        "Optimisation": {"gradient norm": ["^Training/GradNorm$"], "learning rate": ["^Training/LearningRate$"]},
        "Speed": {
            "seconds a step, and without data": ["^machine/Timing/Step$", "^machine/Timing/DataWait$"],
            "samples a second": ["^Training/SamplesPerSecond$"],
        },
    }
