"""LoRA adapters by themselves, in the files and names of peft, for a policy that has the base weights already."""

from __future__ import annotations

from pathlib import Path

from opentau_train.checkpoints.weight_files import write_tensors
from opentau_train.config.finetune import FinetuneSettings
from opentau_train.errors import UserError
from opentau_train.models.finetune import ADAPTER, is_adapter, lora_config
from opentau_train.models.policy import Policy

_PREFIX = "base_model.model."
"""What peft's own wrapper puts before a name."""


def write_adapters(folder: Path, policy: Policy, settings: FinetuneSettings) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json`: the adapters of `policy`, and the modules that train
    beside them. Raises `UserError` where there are none, and for what peft's files have no place for."""
    if not policy.adapters:
        raise UserError(
            "the policy has no LoRA adapters", where="format=adapter", remedy="export it with format=safetensors"
        )
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    beside = _whole_modules(policy, [name for name in trained if not is_adapter(name)])
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {_PREFIX + n.replace(f".{ADAPTER}.weight", ".weight"): p.detach().cpu() for n, p in trained.items()}
    write_tensors(folder / "adapter_model.safetensors", tensors)
    config = lora_config(settings, target_modules=list(policy.adapters), modules_to_save=beside or None)
    config.save_pretrained(folder)


def _whole_modules(policy: Policy, names: list[str]) -> list[str]:
    """The modules that the parameters `names` are the whole of: peft keeps modules beside its adapters, no less."""
    modules = {name.rpartition(".")[0] for name in names}
    inside = {m: [f"{m}.{n}" for n, _ in policy.get_submodule(m).named_parameters()] for m in modules if m}
    split = [n for n in names if not set(inside.get(n.rpartition(".")[0], [""])) <= set(names)]
    if split:
        raise UserError(
            f"peft's files hold adapters and whole modules, and {', '.join(split[:3])} trained alone",
            where="format=adapter",
            remedy="export it with format=safetensors, or train whole modules: finetune.trains=[MODULE.*]",
        )
    return sorted(modules)
