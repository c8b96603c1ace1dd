"""The action sampler as a graph: the policy's actions from named tensors and given noise."""

import pytest
import torch

from opentau_train import load_policy
from opentau_train.deploy import graph
from opentau_train.models.flow import FlowPolicy
from opentau_train.tools import export
from tests.program import TOY, train_here
from tests.unit.deploy.windows import validated

SMALL = {
    "flow_tiny": ["model.width=32", "model.depth=1", "model.heads=2", "model.num_flow_steps=2"],
    "act_tiny": ["model.width=16"],
    "diffusion_tiny": ["model.unet.down_dims=[16,32]", "model.noise.inference_steps=2"],
}


BY_DAY = ("onnx-flow_tiny", "onnx-act_tiny")
"""Both forms begin with the same traced program, and the test above has a pt2 file. A U-Net takes longest to trace."""
FORMS = [
    pytest.param(form, model, marks=() if f"{form}-{model}" in BY_DAY else pytest.mark.nightly)
    for form in ("onnx", "pt2")
    for model in SMALL
]


def real(run, policy):
    """(signature, batch of a window of the run's own dataset)."""
    window = validated(run, policy, 1).windows[0]
    batch = policy.batch([window.seen], window.norm_head, window.key)
    return graph.Signature.of(policy.loaded.policy, batch), batch


@pytest.mark.slow
def test_a_pt2_file_gives_the_policys_actions_for_a_real_window(own_run, policy, tmp_path, capsys):
    out = tmp_path / "policy.pt2"
    assert export.main([f"checkpoint={own_run}", f"out={out}", "format=pt2"]) == 0
    assert "its actions are the checkpoint's within" in capsys.readouterr().out
    signature, batch = real(own_run, policy)
    inputs = signature.inputs(policy.loaded.policy, batch)
    assert {"images.front", "camera_mask.side", "state", "prompt_tokens", "action_dim_mask", "noise.actions"} <= {
        *inputs
    }
    run = torch.export.load(out).module()
    sampled = policy.sample(batch)
    assert (run(inputs) - sampled).abs().max() <= graph.WITHIN * max(1.0, sampled.abs().max())
    other = {**inputs, "noise.actions": torch.zeros_like(inputs["noise.actions"])}
    assert (run(other) - sampled).abs().max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize(("form", "model"), FORMS)
def test_each_small_policy_becomes_a_graph(form, model, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime") if form == "onnx" else None
    words = [word for word in TOY if not word.startswith("model.")]
    words = [*words, f"model={model}", *SMALL[model], "trainer.steps=1", "validation.every=0"]
    run = train_here([*words, "scheduler.warmup_steps=0"], tmp_path / "run")
    out = tmp_path / f"policy.{form}"
    assert export.main([f"checkpoint={run}", f"out={out}", f"format={form}"]) == 0
    policy = load_policy(run, norm_head="toy::default")
    signature, batch = real(run, policy)
    inputs, sampled = signature.inputs(policy.loaded.policy, batch), policy.sample(batch)
    if onnxruntime is not None:
        session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
        assert {value.name for value in session.get_inputs()} <= {*inputs}
        given = {value.name: inputs[value.name].numpy() for value in session.get_inputs()}
        made = torch.from_numpy(session.run(["actions"], given)[0])
    else:
        made = torch.export.load(out).module()(inputs)
    assert (made - sampled).abs().max() <= graph.WITHIN * max(1.0, sampled.abs().max())


@pytest.mark.slow
def test_a_graph_that_gives_other_actions_is_removed(own_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(graph, "_write_pt2", lambda out, program: (out.touch(), lambda inputs: torch.ones(1))[1])
    out = tmp_path / "policy.pt2"
    assert export.main([f"checkpoint={own_run}", f"out={out}", "format=pt2"]) == 1
    assert not out.exists() and "was removed: its actions differ" in capsys.readouterr().err


@pytest.mark.slow
def test_a_policy_that_cannot_be_traced_says_why(own_run, tmp_path, monkeypatch, capsys):
    whole = FlowPolicy.velocity

    def asks(self, batch, context, x, time):
        return whole(self, batch, context, x, time) if x.sum() > 0 else x

    monkeypatch.setattr(FlowPolicy, "velocity", asks)
    assert export.main([f"checkpoint={own_run}", f"out={tmp_path / 'policy.pt2'}", "format=pt2"]) == 2
    err = capsys.readouterr().err
    assert "FlowPolicy can't be traced: " in err and "set format=safetensors" in err and "def forward" not in err
