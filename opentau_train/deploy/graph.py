"""The action sampler as a graph of tensors, for runtimes without this program: `torch.export` and ONNX.

A graph takes what `Policy.sample_actions` reads of a batch of one sample, and the random numbers that it draws, under
these names; what it gives is `actions` [1, T, A] f32, normalised:

    images.CAMERA [1, h+1, 3, H, W] uint8, camera_mask.CAMERA [1] bool, state [1, S] f32, prompt_tokens [1, N] int64
    action_dim_mask [1, A] bool, ...
    noise.actions [1, T, A] f32, standard normal, and whatever else is drawn: noise.NAME

What is made of an observation before (`RobotPolicy.batch`) and of the chunk after it (`RobotPolicy.in_units`) isn't in
the graph.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from opentau_train.data.batch import Batch
from opentau_train.errors import UserError
from opentau_train.models.draws import ACTION_DRAW, Draws
from opentau_train.models.policy import Policy
from opentau_train.models.prompts import check_installed

Format = Literal["onnx", "pt2"]
NOISE = "noise."
WITHIN = 1e-5
"""How far a graph's actions may be from the policy's, of the largest, or of 1."""


class _Watched(Batch):
    """Notes in `names` which fields are read."""

    def __init__(self, batch: Batch):
        super().__init__(batch.fields, batch.values)
        self.names: dict[str, None] = {}

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("values", {}):
            self.__dict__["names"][name] = None
        return super().__getattr__(name)


class _Noted(Draws):
    """Draws as ever, and keeps in `drawn` what was drawn."""

    def __init__(self, keys: Tensor):
        super().__init__(keys, ACTION_DRAW)
        self.drawn: dict[str, Tensor] = {}

    def normal(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        return self.drawn.setdefault(name, super().normal(name, shape))


class _Given(Draws):
    """Gives what it was given."""

    def __init__(self, numbers: Mapping[str, Tensor]):
        self.numbers = numbers

    def normal(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        return self.numbers[name]


@dataclass(frozen=True)
class Signature:
    """What of a batch a policy reads when it samples: `fields`, and the names of its draws."""

    fields: tuple[str, ...]
    drawn: tuple[str, ...]

    @classmethod
    def of(cls, policy: Policy, batch: Batch) -> Signature:
        """What is read of a batch."""
        watched, noted = _Watched(batch), _Noted(batch.key)
        policy.sample_actions(watched, noted)
        return cls(tuple(name for name in watched.names if name != "key"), tuple(noted.drawn))

    def inputs(self, policy: Policy, batch: Batch) -> dict[str, Tensor]:
        """{name: tensor} of a batch, with its own draws: what a graph of the policy takes."""
        made: dict[str, Tensor] = {}
        for name in self.fields:
            value = getattr(batch, name)
            made |= {f"{name}.{camera}": v for camera, v in value.items()} if isinstance(value, dict) else {name: value}
        noted = _Noted(batch.key)
        policy.sample_actions(batch, noted)
        return {name: v.contiguous() for name, v in made.items()} | {f"{NOISE}{n}": v for n, v in noted.drawn.items()}


class Sampler(nn.Module):
    """`policy.sample_actions` as a function of the inputs that a `signature` names."""

    def __init__(self, policy: Policy, signature: Signature):
        super().__init__()
        self.policy, self.signature = policy, signature

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        values: dict[str, Any] = {"weight": torch.ones(1), "key": torch.zeros(1, dtype=torch.int64)}
        for name in self.signature.fields:
            if name in inputs:
                values[name] = inputs[name]
            else:
                values[name] = {c: inputs[f"{name}.{c}"] for c in self.policy.spec.cameras}
        drawn = {name: inputs[f"{NOISE}{name}"] for name in self.signature.drawn}
        return self.policy.sample_actions(Batch((), values), _Given(drawn))


@torch.no_grad()
def write_graph(out: Path, policy: Policy, batches: Sequence[Batch], form: Format) -> float:
    """Write the graph of `policy`, which is in eval mode on the CPU, and read it back. Returns the largest difference
    between its actions and the policy's for the `batches` of one sample, as a share of the largest action or of 1.

    Raises `UserError` where the policy can't be traced, or a package is missing; RuntimeError where the difference is
    more than `WITHIN`, and removes the file.
    """
    if form == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            check_installed(package, "onnx")
    signature = Signature.of(policy, batches[0])
    given = [signature.inputs(policy, batch) for batch in batches]
    with _quiet():
        try:
            program = torch.export.export(Sampler(policy, signature).eval(), (given[0],), strict=False)
        except RuntimeError as error:  # torch's, of whatever its tracing meets
            raise UserError(
                f"{type(policy).__name__} can't be traced: {str(error).strip().splitlines()[0]}",
                where=f"format={form}",
                remedy="set format=safetensors",
            ) from error
        run = _write_pt2(out, program) if form == "pt2" else _write_onnx(out, program, list(given[0]))
    differs = 0.0
    for batch, inputs in zip(batches, given, strict=True):
        expected = policy.sample_actions(batch, Draws(batch.key, ACTION_DRAW))
        differs = max(differs, float((run(inputs) - expected).abs().max() / max(1.0, float(expected.abs().max()))))
    if not differs <= WITHIN:
        out.unlink()
        raise RuntimeError(f"{out} was removed: its actions differ by {differs:.0e} of the largest from the policy's")
    return differs


Run = Callable[[dict[str, Tensor]], Tensor]


def _write_pt2(out: Path, program: torch.export.ExportedProgram) -> Run:
    torch.export.save(program, out)
    again = torch.export.load(out).module()
    return lambda inputs: again(inputs)


def _write_onnx(out: Path, program: torch.export.ExportedProgram, names: list[str]) -> Run:
    made = torch.onnx.export(program, dynamo=True, input_names=names, output_names=["actions"], verbose=False)
    assert made is not None, "the exporter of programs returns what it made"
    made.save(out)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of operations that it doesn't fold
    session = onnxruntime.InferenceSession(out, options, providers=["CPUExecutionProvider"])
    read = [value.name for value in session.get_inputs()]
    return lambda inputs: torch.from_numpy(session.run(None, {n: inputs[n].numpy() for n in read})[0])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' words on what they haven't and don't need, and on the graph where one fails."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
