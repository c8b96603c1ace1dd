"""One file of a trained policy: weights, settings, statistics and convention.

    python -m opentau_train.tools.export checkpoint=runs/droid out=policy.safetensors
    python -m opentau_train.tools.export checkpoint=runs/droid/checkpoints/00001000 weights=ema out=policy.safetensors

    python -m opentau_train.tools.export checkpoint=runs/droid format=adapter out=adapters/

`checkpoint` is a run or one of its checkpoints, `weights` the trained ones (model) or their moving average (ema). The
weights are read from the checkpoint's shards.

`format=safetensors` adds LoRA adapters to the weights that they belong to: the file's policy is a plain one. It is read
back by `pretrained.load_policy` and must predict the same actions, bit for bit, for a golden batch: keyed random inputs
with every kind of gap; merged and unmerged actions must agree within 1e-4 of the largest. `format=adapter` writes the
adapters alone into a folder, in peft's files and names; peft must read them back and predict the checkpoint's actions
bit for bit. Else what was written is removed and the exit code is 1.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from opentau_train.config.typed import build
from opentau_train.errors import EXIT_FAULT, EXIT_OK, EXIT_USER, UserError


@dataclass(frozen=True)
class ExportSettings:
    checkpoint: str
    out: str
    format: Literal["safetensors", "adapter"] = "safetensors"
    weights: Literal["model", "ema"] = "model"

    def check(self, path: str) -> None:
        if self.format == "safetensors" and Path(self.out).suffix != f".{self.format}":
            raise UserError(f"out={self.out} doesn't end in .{self.format}", remedy=f"set out=policy.{self.format}")
        if self.format == "adapter" and Path(self.out).exists() and not Path(self.out).is_dir():
            raise UserError(f"out={self.out} is a file", remedy="name a folder")


MERGED_WITHIN = 1e-4
"""How far merged adapters may move the golden batch's actions, of the largest: sums in another order, 10 steps long."""


def export(settings: ExportSettings) -> tuple[Path, str]:
    """Write and verify the file or folder; returns its path, and what holds of it.

    Raises `UserError` where the checkpoint can't be read, RuntimeError where the file's policy predicts other actions.
    """
    from opentau_train.checkpoints import commit, contents, pretrained  # they import torch: only once the settings hold
    from opentau_train.models.finetune import merge

    checkpoint = commit.at(settings.checkpoint)
    card = pretrained.read_card(checkpoint / pretrained.FOLDER)
    policy = pretrained.build(card).eval()
    contents.load_weights(checkpoint, policy, settings.weights)
    out = Path(settings.out).expanduser()
    holds = "it predicts the checkpoint's actions bit for bit"
    if settings.format == "adapter":
        _export_adapters(policy, card, out)
        return out, holds
    if policy.adapters:
        apart = sample(policy)
        merge(policy)
        moved = abs(sample(policy) - apart).max() / abs(apart).max()
        if not moved <= MERGED_WITHIN:
            raise RuntimeError(f"merged adapters move the actions by {moved:.1e} of the largest: nothing was written")
        holds = f"with the adapters merged it predicts the checkpoint's actions within {moved:.0e} of the largest"
        card = dataclasses.replace(card, config={k: v for k, v in card.config.items() if k != "finetune"})
    out.parent.mkdir(parents=True, exist_ok=True)
    pretrained.write_file(out, dict(policy.state_dict()), card)
    if predict(pretrained.load_policy(out).policy) != predict(policy):
        out.unlink()
        raise RuntimeError(f"{out} was removed: its policy predicts other actions than the checkpoint's")
    return out, holds


def _export_adapters(policy: Any, card: Any, out: Path) -> None:
    from opentau_train.checkpoints import adapters, pretrained
    from opentau_train.models.finetune import set_aside

    adapters.write_adapters(out, policy, pretrained.finetune_of(card))
    from peft import PeftModel

    base = pretrained.build(dataclasses.replace(card, config={**card.config, "finetune": {}})).eval()
    with set_aside(policy, policy.adapters):
        base.load_state_dict(policy.state_dict())
    again = PeftModel.from_pretrained(base, out).eval()
    if predict(again.base_model.model) != predict(policy):
        shutil.rmtree(out)
        raise RuntimeError(f"{out} was removed: peft reads other adapters from it than the checkpoint's")


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
    if not given or {"-h", "--help"} & set(given):
        print(__doc__.strip())
        return EXIT_OK
    try:
        settings = build(ExportSettings, dict(_split(a) for a in given), "")
        out, holds = export(settings)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_USER
    except RuntimeError as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_FAULT
    size = sum(file.stat().st_size for file in (out.rglob("*") if out.is_dir() else [out])) / 1e6
    print(f"{out}: {size:.1f} MB, {settings.weights} weights; {holds}")
    return EXIT_OK


def _split(argument: str) -> tuple[str, str]:
    key, equals, value = argument.partition("=")
    if not equals:
        names = ", ".join(f"{f.name}=..." for f in dataclasses.fields(ExportSettings))
        raise UserError(f"'{argument}' is not of the form KEY=VALUE", remedy=f"give {names}")
    return key, value


if __name__ == "__main__":
    sys.exit(main())
