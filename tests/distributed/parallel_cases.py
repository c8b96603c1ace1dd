"""Started by torchrun with `REPLICATE SHARD`: asserts on every rank what a layout must do to a step.

The reference is the same policy by itself on the whole batch.
"""

import copy
import os
import sys
from contextlib import nullcontext

import torch
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from opentau_train.data.batch import Batch
from opentau_train.distributed.parallel import Execution, Replicas, data_mesh, spread
from opentau_train.distributed.world import World, launch
from opentau_train.models.average import Ema
from opentau_train.step import _clip
from tests.unit.models.flow_cases import Noise, make_batch, make_noise, make_policy

GATHERS = ("c10d::_allgather_base_", "c10d::allgather_", "c10d::allgather_into_tensor_coalesced_")
REDUCTIONS = ("c10d::allreduce_", "c10d::_reduce_scatter_base_", "c10d::reduce_scatter_")
NUM = 8


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(policy: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: whole(p.grad).clone() for name, p in policy.named_parameters()}


def loss(model: torch.nn.Module, batch: Batch, noise: Noise) -> torch.Tensor:
    return sum(s.sum() for s, _ in model(batch, noise).values())


def part_of(batch: Batch, noise: Noise, world: World, micro: int, num_micro: int) -> tuple[Batch, Noise]:
    size = NUM // world.size // num_micro
    start = (world.rank * num_micro + micro) * size
    rows = slice(start, start + size)
    return batch.rows(rows), Noise(noise.noise[rows], noise.time[rows])


def step(
    replicas: Replicas,
    world: World,
    batch: Batch,
    noise: Noise,
    num_micro: int,
    precision: str = "no",
    counted: tuple[str, ...] = REDUCTIONS,
) -> list[int]:
    """Gradients of the global batch in `num_micro` micro-batches a rank, and the number of reductions in each."""
    numbers = []
    for micro in range(num_micro):
        own = part_of(batch, noise, world, micro, num_micro)
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            autocast = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()
            with replicas.accumulate(last=micro == num_micro - 1), autocast:
                value = world.size * loss(replicas.model, *own)
            value.backward()
        numbers.append(sum(event.name in counted for event in seen.events()))
    return numbers


def close(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], tolerance: float) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        scale = right[name].abs().max()
        assert (value - right[name]).abs().max() <= tolerance * scale + 1e-6, name


def main(replicate: int, shard: int) -> None:
    with launch(device="cpu", precision="no", timeout=60, identity={}) as world:
        batch = make_batch(num=NUM)
        noise = make_noise(batch)
        plain = make_policy()
        alone = copy.deepcopy(plain)
        loss(alone, batch, noise).backward()
        expected = {name: p.grad.clone() for name, p in alone.named_parameters()}

        policy = make_policy()
        mesh = data_mesh(world, replicate, shard)
        replicas = spread(policy, policy.blocks(), world, mesh)
        assert replicas.sharded == (shard > 1)
        assert get_model_state_dict(policy).keys() == plain.state_dict().keys()

        # Gradients are those of the whole batch, and only the last micro-batch reduces them.
        *before, last = step(replicas, world, batch, noise, num_micro=2)
        assert before == [0] and last > 0, (before, last)
        eager = gradients(policy)
        close(eager, expected, 1e-4)

        # One norm over all shards, the same on every rank; the limit holds afterwards.
        norm = float(_clip(policy, 0.5))
        reference = float(torch.cat([g.flatten() for g in expected.values()]).norm())
        assert abs(norm - reference) <= 1e-4 * reference, (norm, reference)
        after = float(torch.cat([g.flatten() for g in gradients(policy).values()]).norm())
        assert abs(after - 0.5) < 1e-4, after

        # The average is sharded as the parameters are: a rank holds one of `shard` parts of it.
        ema = Ema(policy, 0.5)
        held = sum((v.to_local() if shard > 1 else v).numel() for v in ema.average.values())
        total = sum(p.numel() for p in plain.parameters())
        assert world.gather(held) and sum(world.gather(held)) == replicate * total
        ema.update(policy, step=0)
        close({n: whole(v) for n, v in ema.average.items()}, dict(plain.named_parameters()), 1e-6)

        if shard > 1:
            gathered_once(world, mesh, batch, noise, eager)
        wrapped(world, mesh, batch, noise, eager)
        bf16(world, mesh, batch, noise, eager)


def gathered_once(world: World, mesh: DeviceMesh, batch: Batch, noise: Noise, eager: dict) -> None:
    """By default every micro-batch gathers; with `gather_once` only the first one of a step, to the same gradients."""
    for once in (False, True):
        policy = make_policy()
        replicas = spread(policy, policy.blocks(), world, mesh, Execution(gather_once=once))
        for _ in range(2):  # two steps: the first one's last micro-batch lets go of the parameters
            policy.zero_grad()
            first, *others = step(replicas, world, batch, noise, num_micro=NUM // world.size, counted=GATHERS)
            assert first > 0 and all((n == 0) == once for n in others), (once, first, others)
        wholes = [p for p in policy.parameters() if not isinstance(p, DTensor)]
        assert not wholes, "the parameters are sharded again after a step"
    close(gradients(policy), eager, 1e-5)


def wrapped(world: World, mesh: DeviceMesh | None, batch: Batch, noise: Noise, eager: dict) -> None:
    """Activation checkpointing computes a block twice and changes no bit; compiled blocks agree with eager ones."""
    for compile_backend, tolerance in ((None, 0.0), ("aot_eager", 1e-4)):
        policy = make_policy()
        runs = []
        policy.layers[0].mlp.up.register_forward_hook(lambda *_, seen=runs: seen.append(1))
        execution = Execution(activation_checkpointing=True, compile_backend=compile_backend)
        replicas = spread(policy, policy.blocks(), world, mesh, execution)
        assert get_model_state_dict(policy).keys() == make_policy().state_dict().keys()
        step(replicas, world, batch, noise, num_micro=2)
        if compile_backend is None:
            assert len(runs) == 4, runs
            assert all(torch.equal(g, eager[n]) for n, g in gradients(policy).items())
        close(gradients(policy), eager, tolerance)


def bf16(world: World, mesh: DeviceMesh | None, batch: Batch, noise: Noise, eager: dict) -> None:
    """Computed in bfloat16; parameters and gradients stay float32 and aren't rounded by the reduction."""
    policy = make_policy()
    seen = []
    policy.layers[0].mlp.up.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    replicas = spread(policy, policy.blocks(), world, mesh, Execution("bf16"))
    step(replicas, world, batch, noise, num_micro=1, precision="bf16")
    assert set(seen) == {torch.bfloat16}
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in policy.parameters())
    found = gradients(policy)
    for name, gradient in found.items():  # each: a target or an input rounded on the way shows in some alone
        alike = torch.nn.functional.cosine_similarity(gradient.flatten(), eager[name].flatten(), dim=0)
        assert alike > 0.99, (name, alike)
    matrix = found["layers.0.mlp.up.weight"]
    assert not torch.equal(matrix, matrix.bfloat16().float())


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
    print("all held", flush=True)
    os._exit(0)  # as the program ends: gloo's destructors may hang
