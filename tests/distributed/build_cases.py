"""Started by torchrun on 4 ranks: what building a sharded policy costs a rank, and that it is one process's policy.

Also what needs several ranks of a sharded optimizer: Muon's moments, saved and read back, and the memory that a rank
was foreseen to hold.
"""

import ctypes
import dataclasses
import gc
import os
import re
import sys
from datetime import timedelta
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from opentau_train import cli
from opentau_train.checkpoints import contents
from opentau_train.checkpoints.card import Pretrained
from opentau_train.checkpoints.saver import Saver
from opentau_train.checkpoints.start import Start, spread_policy
from opentau_train.checkpoints.weights import FirstWeights, load_pretrained
from opentau_train.config.optimizer import OptimizerSettings, ParameterRule
from opentau_train.config.settings import CheckpointSettings, load_settings
from opentau_train.data.fields import FIELDS
from opentau_train.distributed.memory import footprint
from opentau_train.distributed.parallel import Execution, data_mesh
from opentau_train.distributed.rehearsal import Rehearsal
from opentau_train.distributed.world import COLLECTIVE_MARGIN, World, launch
from opentau_train.models.average import Ema
from opentau_train.models.flow import FlowPolicy
from opentau_train.models.weight_map import WeightMap
from opentau_train.optim import build_optimizer, set_lr
from opentau_train.step import TrainState
from tests.program import TOY
from tests.unit.models.flow_cases import SPEC, make_batch, make_noise

TIMEOUT = 60
BIG = {"width": 512, "depth": 6, "heads": 8, "patch_size": 8, "stem_channels": 8}
SMALL = {"width": 32, "depth": 2, "heads": 2, "patch_size": 8, "stem_channels": 8, "max_prompt_bytes": 32}
MUON = OptimizerSettings(
    lr=1e-2,
    target="opentau_train.optim.MuonAdamW",
    groups={"layers": ParameterRule("layers.*", options={"muon": True})},
)


class BuiltWhole(FlowPolicy):
    """As a policy whose constructor needs real memory."""

    meta_init = False


class Partly(FlowPolicy):
    """Begins from a file that lacks two tensors and has two of other dimensions."""

    def weight_map(self) -> WeightMap:
        other = ("action_in.*", "velocity_out.*")
        return WeightMap(new=("bins_out.*", "layers.0.*", *other), ignored=other)


def peak_bytes() -> int:
    """The most memory that this process held since `reset_peak`."""
    kilobytes = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kilobytes[1]) * 1024


def reset_peak() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free goes back to the system, or the next peak would hide in it
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def growth(world: World, cls: type, weights: Path | None = None) -> tuple[int, nn.Module]:
    """The bytes that building the policy added to this process at its peak, and the policy.

    The least of three: what a first call loads, and pages of libraries that the kernel maps meanwhile, come on top.
    """
    growths = []
    for _ in range(3):
        before = reset_peak()
        policy, _ = build(world, -1, cls, weights, **BIG)
        growths.append(peak_bytes() - before)
    return min(growths), policy


def build(world: World, shard: int, cls: type = FlowPolicy, weights: Path | None = None, **options):
    model = {"_target_": f"{cls.__module__}.{cls.__qualname__}", **options}
    torch.manual_seed(3)
    mesh = data_mesh(world, -1, shard)
    first = None if weights is None else FirstWeights("pretrained_path", str(weights), weights, resize=False)
    return spread_policy(model, SPEC, world, mesh, Execution(), Start(first))


def same_numbers(policy: nn.Module, plain: nn.Module) -> None:
    for (name, own), (_, whole) in zip(policy.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(own.full_tensor() if isinstance(own, DTensor) else own, whole), name


def a_rank_holds_a_quarter_at_most_a_half_while_building(world: World) -> None:
    grown, policy = growth(world, FlowPolicy)
    whole = sum(p.numel() * p.element_size() for p in policy.parameters())
    local = sum(p.to_local().numel() * p.element_size() for p in policy.parameters())
    assert whole > 60e6 and local <= 1.1 / 4 * whole, (local, whole)
    assert grown <= 0.5 * whole, f"the peak grew by {grown / 1e6:.0f} MB for a policy of {whole / 1e6:.0f} MB"
    del policy
    seen = growth(world, BuiltWhole)[0]
    assert seen >= 0.9 * whole, f"the measurement saw {seen / 1e6:.0f} MB of a policy built whole"


def every_layout_has_the_numbers_of_one_process(world: World) -> None:
    torch.manual_seed(3)
    plain = FlowPolicy(SPEC, **SMALL)
    after = torch.get_rng_state()
    for shard in (1, 2, 4):
        for cls in (FlowPolicy, BuiltWhole):
            policy, replicas = build(world, shard, cls, **SMALL)
            assert replicas.sharded == (shard > 1)
            same_numbers(policy, plain)
            assert torch.equal(torch.get_rng_state(), after), "what is drawn later is the same too"


def a_rank_reads_its_own_slices_of_first_weights(world: World, folder: Path) -> None:
    file = folder / "big.safetensors"
    if world.is_main:
        torch.manual_seed(1)
        save_file(FlowPolicy(SPEC, **BIG).state_dict(), file)
    world.barrier()
    grown, policy = growth(world, FlowPolicy, file)
    whole = sum(p.numel() * p.element_size() for p in policy.parameters())
    assert grown <= 0.5 * whole, f"the peak grew by {grown / 1e6:.0f} MB for weights of {whole / 1e6:.0f} MB"
    weights = load_file(file)
    for name, own in policy.state_dict().items():
        assert torch.equal(own.full_tensor(), weights[name]), name


def first_weights_are_the_same_in_every_layout(world: World, folder: Path) -> None:
    """Also where a dimension is cut or filled, and where some are drawn because the file lacks them."""
    torch.manual_seed(1)
    weights = FlowPolicy(SPEC, **SMALL).state_dict()
    weights["action_in.weight"] = torch.ones(32, 7)
    weights["velocity_out.weight"] = torch.ones(3, 32)  # a file of 3 rows for 4 on up to 4 ranks
    del weights["bins_out.weight"], weights["layers.0.mlp.up.weight"]
    if world.is_main:
        save_file(weights, folder / "small.safetensors")
    world.barrier()
    mapping = WeightMap(new=("bins_out.*", "layers.0.*"), resized=("action_in.*", "velocity_out.*"))
    wholes = []
    for shard in (1, 2, 4):
        for cls in (FlowPolicy, BuiltWhole):
            policy, _ = build(world, shard, cls, **SMALL)
            report = load_pretrained(policy, folder / "small.safetensors", mapping)
            assert set(report.missing) == {"bins_out.weight", "layers.0.mlp.up.weight"}
            state = policy.state_dict().items()
            wholes.append({n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in state})
    for whole in wholes:
        assert all(torch.equal(value, wholes[0][name]) for name, value in whole.items())
    assert torch.equal(wholes[0]["velocity_out.weight"].sum(1), torch.tensor([32.0, 32.0, 32.0, 0.0]))
    assert wholes[0]["action_in.weight"].eq(1).all() and wholes[0]["bins_out.weight"].std() > 0


def what_is_drawn_beside_first_weights_is_the_same_in_every_layout(world: World, folder: Path) -> None:
    drawn = []
    for shard in (1, 2, 4):
        policy, _ = build(world, shard, Partly, folder / "small.safetensors", **SMALL)
        drawn.append([t.full_tensor() if isinstance(t, DTensor) else t for t in policy.state_dict().values()])
        drawn[-1].append(torch.get_rng_state())
    assert all(torch.equal(a, b) for other in drawn[1:] for a, b in zip(drawn[0], other, strict=True))


def muon_state(world: World, seed: int) -> TrainState:
    policy, replicas = build(world, 4, **SMALL)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1 + seed)
    return TrainState(policy, replicas, build_optimizer(policy, MUON), Ema(policy, 0.5))


def train(state: TrainState, steps: int) -> None:
    for _ in range(steps):
        batch = make_batch(seed=state.step)
        sum(s.sum() for s, _ in state.replicas.model(batch, make_noise(batch, state.step)).values()).backward()
        set_lr(state.optimizer, 1e-2)
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.ema.update(state.policy, step=0)
        state.step += 1


def muon_of_shards_goes_on_bit_for_bit(world: World, folder: Path) -> None:
    state, other = muon_state(world, 0), muon_state(world, 1)
    train(state, 2)
    with Saver(folder, world, CheckpointSettings(asynchronous=False), Pretrained({}, {}, {})) as saver:
        path = saver.save(state, stream={}, counters={})
    contents.load(path, other, world)
    train(state, 1)
    train(other, 1)
    for part in ("model", "ema"):
        left, right = (contents.tensors_of(s)[part] for s in (state, other))
        assert all(torch.equal(left[n].to_local(), right[n].to_local()) for n in left)
    buffers = [s for s in state.optimizer.state.values() if "momentum_buffer" in s]
    assert len(buffers) == 8 and all(isinstance(s["momentum_buffer"], DTensor) for s in buffers)


def a_rank_holds_what_was_foreseen(world: World) -> None:
    """Its shards of parameters, gradients, moments and average; and between micro-batches, whole gradients."""
    with torch.device("meta"):
        plain = FlowPolicy(dataclasses.replace(SPEC, fields=make_batch().fields[len(FIELDS) :]), **SMALL)
    rehearsal = Rehearsal(plain, plain.spec, "cpu")
    words = [*TOY, "parallelism=fsdp", "trainer.global_batch_size=8", "trainer.ema_decay=0.5"]
    settings, accumulating = (
        load_settings(cli.compose([*words, f"data.max_samples_per_batch={num}"])) for num in (2, 1)
    )
    policy, replicas = build(world, 4, **SMALL)
    state = TrainState(policy, replicas, build_optimizer(policy, settings.optimizer), Ema(policy, 0.5))
    train(state, 1)
    gradients_of(state, last=True)
    moments = [v for values in state.optimizer.state.values() for v in values.values()]
    held = {
        "parameters": local_bytes(policy.parameters()),
        "gradients": local_bytes(p.grad for p in policy.parameters()),
        "moments": local_bytes(moments),
        "average": local_bytes(state.ema.average.values()),
    }
    foreseen = footprint(rehearsal, settings, 4).parts
    for part, size in held.items():
        assert size == foreseen[part] if world.is_main else 0.9 * foreseen[part] < size <= foreseen[part], part
    state.optimizer.zero_grad()
    gradients_of(state, last=False)
    whole = sum(g.nbytes for g in unsharded_gradients(policy))
    assert foreseen["gradients"] + whole == footprint(rehearsal, accumulating, 4).gradients


def gradients_of(state: TrainState, *, last: bool) -> None:
    batch = make_batch()
    with state.replicas.accumulate(last=last):
        sum(s.sum() for s, _ in state.replicas.model(batch, make_noise(batch)).values()).backward()


def local_bytes(tensors) -> int:
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)


def unsharded_gradients(policy: nn.Module) -> list[torch.Tensor]:
    """The gradients that FSDP keeps whole: it has no public way to ask for them."""
    groups = (m._get_fsdp_state()._fsdp_param_group for m in policy.modules() if isinstance(m, FSDPModule))
    parameters = [p for group in groups for p in group.fsdp_params]
    return [
        p.unsharded_accumulated_grad_data if p.unsharded_accumulated_grad is not None else p.unsharded_grad_data
        for p in parameters
    ]


def main(folder: Path) -> None:
    with launch(device="cpu", precision="no", timeout=TIMEOUT, identity={}) as world:
        a_rank_holds_a_quarter_at_most_a_half_while_building(world)
        every_layout_has_the_numbers_of_one_process(world)
        a_rank_reads_its_own_slices_of_first_weights(world, folder)
        first_weights_are_the_same_in_every_layout(world, folder)
        what_is_drawn_beside_first_weights_is_the_same_in_every_layout(world, folder)
        muon_of_shards_goes_on_bit_for_bit(world, folder)
        a_rank_holds_what_was_foreseen(world)
        options = world.background_group()._get_backend(torch.device("cpu")).options
        assert options._timeout == timedelta(seconds=TIMEOUT + COLLECTIVE_MARGIN)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    print("all held", flush=True)
    os._exit(0)  # as the program ends: gloo's destructors may hang
