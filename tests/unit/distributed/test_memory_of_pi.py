"""pi0's and pi0.5's memory by arithmetic, and the table of docs/scaling.md."""

from __future__ import annotations

import re

import pytest
import torch

from opentau_train.data.transforms.pipeline import meet
from opentau_train.distributed.rehearsal import Rehearsal, kept_for_backward
from opentau_train.errors import EXIT_OK
from opentau_train.models.draws import Draws
from opentau_train.models.pi.pi0 import Pi0Policy
from opentau_train.models.pi.pi05 import Pi05Policy
from opentau_train.tools import plan
from tests.nightly import at_night
from tests.program import REPO
from tests.unit.models.pi_cases import SPEC, TOKENS, make_batch, make_pi
from tests.unit.tools.test_plan import memory_rows

pytestmark = pytest.mark.slow  # transformers takes 5 s to import

BF16, CHECKPOINTED = "trainer.precision=bf16", "parallelism.activation_checkpointing=true"
ALWAYS = (f"parallelism=fsdp {BF16} {CHECKPOINTED}",)
OTHERS = ("", f"{BF16} {CHECKPOINTED} data.max_samples_per_batch=16", f"parallelism=fsdp {BF16}")
"""Arguments of the documented table: each plan of pi0 takes ten seconds. The first has all that the others have but
whole parameters, which smaller policies' tests have."""


@pytest.mark.parametrize("changes", [{}, {**TOKENS, "insulate": True}], ids=["flow", "tokens"])
@pytest.mark.parametrize("cls", [Pi0Policy, Pi05Policy])
def test_activations_are_what_a_real_forward_of_whole_samples_keeps(cls, changes):
    policy = make_pi(cls, **changes)
    with torch.device("meta"):
        planned = make_pi(cls, **changes)
    rehearsal = Rehearsal(planned, meet(SPEC, policy.wants()), "cpu")
    batch = make_batch(policy, num=3, whole=True)
    assert rehearsal.activations(3, False, False) == kept_for_backward(policy, batch, Draws(batch.key))
    assert not rehearsal.notes


@at_night
@pytest.mark.parametrize("which", [ALWAYS, OTHERS], ids=["some", "others"])
def test_the_documented_table_is_what_the_plan_prints(which, capsys):
    text = (REPO / "docs/scaling.md").read_text().partition("## pi0 on 1, 8, 64 GPUs")[2].partition("\n## ")[0]
    command = re.search(r"tools\.plan (.*?)\n```", text.replace("\\\n", ""), re.S)[1].split()
    documented, arguments = [], ""
    for row in re.findall(r"^\| (?!arguments|---)(.*) \|$", text, re.M):
        cells = [cell.strip() for cell in row.split("|")]
        arguments = "".join(re.findall(r"`(.*)`", cells[0])) if cells[0] else arguments
        documented.append((arguments, cells[1:]))
    assert len(documented) == 10 and {arguments for arguments, _ in documented} == {*ALWAYS, *OTHERS}
    documented = [row for row in documented if row[0] in which]
    printed = {}
    for arguments, (gpus, samples, *sizes) in documented:
        if arguments not in printed:
            assert plan.main([*command, *arguments.split()]) == EXIT_OK
            printed[arguments] = memory_rows(capsys.readouterr().out)
        row = printed[arguments][int(gpus)]
        assert row["samples"] == samples
        names = ("parameters", "gradients", "moments", "gathered", "activations", "a rank")
        assert [rounded(row[name]) for name in names] == sizes, (arguments, gpus)


def rounded(size: str) -> str:
    """A printed size in GiB with one decimal; nothing for 0."""
    if size == "0":
        return ""
    value, unit = size.split()
    return f"{float(value) / {'GiB': 1, 'MiB': 1024}[unit]:.1f}"
