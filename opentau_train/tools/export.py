"""One file of a trained policy: weights, settings, statistics and convention. Or a folder that LeRobot loads.

    python -m opentau_train.tools.export checkpoint=runs/droid out=policy.safetensors
    python -m opentau_train.tools.export checkpoint=runs/droid/checkpoints/00001000 weights=ema out=policy.safetensors
    python -m opentau_train.tools.export checkpoint=runs/act format=lerobot out=act_policy

    python -m opentau_train.tools.export checkpoint=runs/droid format=adapter out=adapters
    python -m opentau_train.tools.export checkpoint=runs/droid format=onnx out=policy.onnx

`checkpoint` is a run or one of its checkpoints, `weights` the trained ones (model) or their moving average (ema). The
weights are read from the checkpoint's shards, frozen ones that it leaves out where the run read them, or at `base`.

`format=safetensors` makes one file with all weights. LoRA adapters are added to the weights that they belong to: the
file's policy is a plain one, whose actions agree with the checkpoint's within 1e-4 of the largest. `format=lerobot`
makes a folder of the same policy for LeRobot 0.4, with the statistics of one `norm_head`, for policies that it has too.
`format=adapter` makes a folder with the adapters alone, in peft's files and names. `format=onnx` and `format=pt2` make
the action sampler alone, a graph for ONNX runtimes or `torch.export.load`; docs/deploy.md has its inputs.

After writing, the files are read back (adapters by peft itself) and must predict the same actions, bit for bit, for a
golden batch: keyed random inputs with every kind of gap; a graph the same within 1e-5 for an observation of each robot.
Else nothing is left.

What is at `out` already stays, and is an error, unless `force=true` is given: it is then replaced once the new file is
written and verified. Directories above `out` are made, but none at the root of the filesystem.

Exit codes: 0; 2 for a mistake in what was given, with where and a remedy; 1 where the policy that is read back predicts
other actions, or for what the machine does.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from opentau_train.config.typed import build
from opentau_train.errors import EXIT_FAULT, EXIT_OK, UserError, check_machine, did_you_mean
from opentau_train.tools.options import answer
from opentau_train.tools.out import check_place

CARDS = {"config.json", "adapter_config.json"}
"""Files of which each folder that is written has one."""


@dataclass(frozen=True)
class ExportSettings:
    checkpoint: str
    out: str
    format: Literal["safetensors", "lerobot", "adapter", "onnx", "pt2"] = "safetensors"
    weights: Literal["model", "ema"] = "model"
    norm_head: str | None = None
    """Whose statistics a folder for LeRobot has; None: those of the only one."""
    base: str | None = None
    """Where frozen weights that the checkpoint leaves out lie now; None: where they lay in training."""
    trust: tuple[str, ...] = ()
    """Modules that the checkpoint may name classes of, besides this package's and those of installed plugins."""

    force: bool = False
    """true = what lies at `out` is replaced."""

    def check(self, path: str) -> None:
        out = Path(self.out).expanduser()
        is_folder = self.format in ("lerobot", "adapter")
        if not is_folder and out.suffix != f".{self.format}":
            raise UserError(f"out={self.out} doesn't end in .{self.format}", remedy=f"set out=policy.{self.format}")
        check_place(out, "out")
        if out.is_dir() and not is_folder:
            raise UserError(
                f"{out} can't be written: it is a directory", where="out", remedy=f"set out={out}/policy{out.suffix}"
            )
        inside = {path.name for path in out.iterdir()} if out.is_dir() else set()
        if inside or (out.exists() and not out.is_dir()):
            if not self.force:
                raise UserError(f"{out} is there already", where="out", remedy="add force=true to replace it")
            if inside and not inside & CARDS:  # all that is in it would go
                raise UserError(f"{out} holds no policy, but other files", where="out", remedy="name another directory")


MERGED_WITHIN = 1e-4
"""How far merged adapters may move the golden batch's actions, of the largest: sums in another order, 10 steps long."""


def export(settings: ExportSettings) -> tuple[Path, str]:
    """Write and verify the file or folder; returns its path, and what holds of it.

    Raises `UserError` where the checkpoint can't be read or the file not written, RuntimeError where the file's policy
    predicts other actions.
    """
    from safetensors import SafetensorError  # imports torch, as those below do: only once the settings hold

    from opentau_train import strangers
    from opentau_train.checkpoints import commit, contents, manifest, pretrained
    from opentau_train.checkpoints.card import FOLDER, read_card

    checkpoint = commit.at(settings.checkpoint)
    manifest.check(checkpoint)
    card = pretrained.with_base(read_card(checkpoint / FOLDER, settings.trust), settings.base)
    with strangers.understood("the policy", checkpoint / FOLDER):
        policy = pretrained.build(card).eval()
    contents.load_weights(checkpoint, policy, settings.weights)
    expected, holds = predict(policy), "it predicts the checkpoint's actions bit for bit"
    if policy.adapters and settings.format != "adapter":
        holds = _merge(policy)
        expected = predict(policy)
    out = Path(settings.out).expanduser()
    write = {"safetensors": _write_file, "lerobot": _write_lerobot, "adapter": _write_adapters}
    try:
        with replacing(out) as fresh:
            if settings.format == "onnx" or settings.format == "pt2":
                return out, _write_graph(fresh, policy, card, settings.format)
            again = write[settings.format](fresh, policy, card, settings.norm_head)
            if predict(again) != expected:
                raise RuntimeError(f"{out} was not written: its policy predicts other actions than the checkpoint's")
    except (OSError, SafetensorError) as error:
        check_machine(error, out)
        what = f"the policy can't be written: {error}"
        raise UserError(what, where=str(out), remedy="set out to a place that you can write") from error
    return out, holds


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """The path beside `out`, of the same name, that is written instead: it takes the place of what is at `out` when the
    block ends, and goes where an error ends it. Raises OSError."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        fresh = Path(folder) / out.name
        yield fresh
        for path in Path(folder).iterdir():  # a graph may have its weights in a file of their own
            place = out.with_name(path.name)
            if place.is_dir():
                shutil.rmtree(place)
            path.replace(place)


def _merge(policy: Any) -> str:
    """Merge the adapters of `policy`; returns what then holds. Raises RuntimeError where its actions move."""
    from opentau_train.models.finetune import merge

    apart = sample(policy)
    merge(policy)
    moved = abs(sample(policy) - apart).max() / abs(apart).max()
    if not moved <= MERGED_WITHIN:
        raise RuntimeError(f"merged adapters move the actions by {moved:.1e} of the largest: nothing was written")
    return f"with the adapters merged it predicts the checkpoint's actions within {moved:.0e} of the largest"


def _write_file(out: Path, policy: Any, card: Any, norm_head: str | None) -> Any:
    """Each of these writes `policy` and returns what is read back."""
    from opentau_train.checkpoints import card as cards
    from opentau_train.checkpoints import pretrained

    cards.write_file(out, dict(policy.state_dict()), pretrained.whole(card))
    return pretrained.load_policy(out, trust=card.trust).policy


def _write_graph(out: Path, policy: Any, card: Any, form: Literal["onnx", "pt2"]) -> str:
    """Returns what holds of it. Raises as `write_graph` does."""
    import torch

    from opentau_train.checkpoints import pretrained
    from opentau_train.deploy import graph, latency, robots
    from opentau_train.deploy.policy import RobotPolicy

    loaded = pretrained.loaded_as(card, policy)
    robot = RobotPolicy(loaded, torch.device("cpu"), robots.robots_of(loaded))
    seen = [robot.batch([latency.noise(robot, one)], head) for head, one in robot.robots.items()]
    differs = graph.write_graph(out, policy, seen, form)
    return f"its actions are the checkpoint's within {differs:.0e} of the largest"


def _write_lerobot(out: Path, policy: Any, card: Any, norm_head: str | None) -> Any:
    from opentau_train.checkpoints import lerobot, pretrained
    from opentau_train.checkpoints.weights import load_pretrained

    datasets = pretrained.datasets_of(card)
    head = _head(norm_head, sorted(datasets))
    lerobot.write_lerobot(out, policy, datasets[head].values(), head)
    again = pretrained.build(pretrained.whole(card)).eval()
    load_pretrained(again, out, policy.weight_map())
    return again


def _write_adapters(out: Path, policy: Any, card: Any, norm_head: str | None) -> Any:
    from opentau_train.checkpoints import adapters, pretrained
    from opentau_train.models.finetune import set_aside

    adapters.write_adapters(out, policy, pretrained.finetune_of(card))
    from peft import PeftModel

    plain = pretrained.build(pretrained.whole(card)).eval()
    with set_aside(policy, policy.adapters):
        plain.load_state_dict(policy.state_dict())
    return PeftModel.from_pretrained(plain, out).eval().base_model.model


def _head(given: str | None, heads: Sequence[str]) -> str:
    head = heads[0] if given is None and len(heads) == 1 else given
    if head is not None and head in heads:
        return head
    what = "the policy has several norm heads" if given is None else f"the policy has no norm head '{given}'"
    raise UserError(f"{what}{did_you_mean(given or '', heads)}", remedy=f"set norm_head to one of {', '.join(heads)}")


def sample(policy: Any) -> Any:
    """The actions [B, T, A] that `policy` predicts for its golden batch, as a NumPy array."""
    from opentau_train.models.draws import Draws

    batch = golden_batch(policy)
    return policy.sample_actions(batch, Draws(batch.key)).numpy()


def predict(policy: Any) -> bytes:
    """The bits of `sample`."""
    return sample(policy).tobytes()


def golden_batch(policy: Any, num: int = 4) -> Any:
    """A `Batch` for `policy`, from keyed random numbers alone: the same everywhere, for ever.

    Sample 1 lacks prompt, state and cameras, sample 2 the last dimension of state and actions.
    """
    import numpy as np

    from opentau_train import rng
    from opentau_train.data.batch import stack
    from opentau_train.data.transforms.pipeline import Pipeline, meet

    spec = meet(policy.spec, policy.wants())
    prompts = ("put the cup on the plate", "", "open the drawer", "wipe the table")
    samples = []
    for number in range(num):

        def draw(name: str, *shape: int, number: int = number) -> np.ndarray:
            return rng.normal(rng.key("golden", name, number), int(np.prod(shape))).reshape(shape)

        whole, lacks_last = number != 1, number == 2
        state_dims = np.arange(spec.state_dim) < (spec.state_dim - lacks_last) * whole
        frames = (spec.history + 1, *spec.image_size, 3)
        record = {
            "images": {c: (draw(c, *frames) * 64 + 128).clip(0, 255).astype(np.uint8) for c in spec.cameras if whole},
            "state": draw("state", spec.state_dim) * state_dims,
            "state_dim_mask": state_dims,
            "action_dim_mask": np.arange(spec.action_dim) < max(1, spec.action_dim - lacks_last),
            "prompt": prompts[number % len(prompts)],
            "key": number,
            "weight": 1.0,
        }
        samples.append(Pipeline(policy.wants().transforms)(record, number, training=False))
    return stack(samples, spec)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return answer(__doc__, work, given or ["--help"])


def work(words: Sequence[str]) -> int:
    """Export as the arguments say. Raises `UserError`."""
    settings = build(ExportSettings, dict(_split(word) for word in words), "")
    try:
        out, holds = export(settings)
    except RuntimeError as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_FAULT
    size = sum(file.stat().st_size for file in ([out] if out.is_file() else out.iterdir())) / 1e6
    print(f"written to {out.absolute()}: {size:.1f} MB, {settings.weights} weights; {holds}")
    return EXIT_OK


def _split(word: str) -> tuple[str, Any]:
    """The key and the value of KEY=VALUE. Raises `UserError`."""
    key, equals, value = word.partition("=")
    names = [field.name for field in dataclasses.fields(ExportSettings)]
    if not equals:
        likely = word if word in names else "checkpoint" if Path(word).expanduser().exists() else "KEY"
        remedy = f"write {likely}={'VALUE' if likely in (word, 'KEY') else word}; there are {', '.join(names)}"
        raise UserError(f"'{word}' is not of the form KEY=VALUE", where="the arguments", remedy=remedy)
    if key not in names:
        near = did_you_mean(key, names)
        raise UserError(f"unknown key '{key}'{near}", where="the arguments", remedy=f"there are {', '.join(names)}")
    return key, yaml.safe_load(value) if key in ("trust", "force") else value


if __name__ == "__main__":
    sys.exit(main())
