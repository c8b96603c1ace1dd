"""What of a policy trains (`FinetuneSettings`), and LoRA adapters in it, by peft's layers.

An adapter wraps one linear layer inside a block, so that blocks are sharded, compiled and recomputed as before. The
policy remembers the names of the wrapped layers (`Policy.adapters`); everything here goes by them. peft is imported
where adapters are made only: it takes five seconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from opentau_train.config.finetune import FinetuneSettings
from opentau_train.errors import UserError, fits_nothing
from opentau_train.models.policy import Policy
from opentau_train.models.weight_map import fits

ADAPTER = "default"
"""The name that peft gives the one adapter of a layer; a part of its parameters' names."""


def prepare_finetune(policy: Policy, settings: FinetuneSettings) -> None:
    """Say for each parameter of `policy`, just built, whether it trains, and put in the adapters.

    What needs no gradient already is never turned on and gets no adapter. Adapters draw from torch's global generator
    unless they are made on the meta device. Raises `UserError` for a pattern that fits nothing, for layers that can't
    take an adapter, and where nothing would train.
    """
    trainable = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    for key, patterns in (("trains", settings.trains), ("frozen", settings.frozen)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in trainable):
                raise fits_nothing("trainable parameter", f"finetune.{key}", pattern, trainable)
    targets = _targets(policy, settings)
    for name, parameter in trainable.items():
        parameter.requires_grad_(fits(name, settings.trains) and not fits(name, settings.frozen))
    if targets:
        trains = [p for p in trainable.values() if p.requires_grad]
        _inject(policy, targets, settings)
        for parameter in trains:
            parameter.requires_grad_(True)  # peft has turned off all but its own
    if not any(p.requires_grad for p in policy.parameters()):
        raise UserError(
            "nothing would train: finetune leaves no parameter",
            where="finetune.trains and finetune.frozen",
            remedy='set finetune.trains=["*"], and in finetune.frozen only what shall keep its numbers',
        )


def _targets(policy: Policy, settings: FinetuneSettings) -> list[str]:
    """The names of the linear layers that get an adapter."""
    if settings.rank is None:
        return []
    # torch's own attention multiplies by its layers' weights without calling them: an adapter would do nothing.
    attention = {name for name, module in policy.named_modules() if isinstance(module, nn.MultiheadAttention)}
    linear = {n: m for n, m in policy.named_modules() if isinstance(m, nn.Linear) and m.weight.requires_grad}
    able = {n: m for n, m in linear.items() if n.rpartition(".")[0] not in attention}
    if settings.targets is None:
        inside = {id(module) for block in policy.blocks() for module in block.modules()}
        names = [name for name, module in able.items() if id(module) in inside]
        if not names:
            raise UserError(
                "the policy's blocks have no linear layer that can take an adapter",
                where="finetune.targets",
                remedy=f"name others: it has {', '.join(able) or 'none'}",
            )
        return names
    for pattern in settings.targets:
        if any(fnmatchcase(name, pattern) for name in able):
            continue
        if any(fnmatchcase(name, pattern) for name in {*attention, *linear}):
            raise UserError(
                f"'{pattern}' fits torch's own attention alone (nn.MultiheadAttention), which can't take an adapter",
                where="finetune.targets",
                remedy="leave it out, and train it fully if need be: finetune.trains=[PATTERN]",
            )
        raise fits_nothing("linear layer", "finetune.targets", pattern, able)
    return [name for name in able if fits(name, settings.targets)]


def lora_config(settings: FinetuneSettings, **options: Any) -> Any:
    """peft's settings of the adapters."""
    from peft import LoraConfig

    assert settings.rank is not None
    alpha: Any = settings.rank if settings.alpha is None else settings.alpha  # any number: it is divided by the rank
    return LoraConfig(r=settings.rank, lora_alpha=alpha, lora_dropout=settings.dropout, **options)


def _inject(policy: Policy, names: Sequence[str], settings: FinetuneSettings) -> None:
    from peft import inject_adapter_in_model

    # In a list of their own: peft matches names by their ends, and asks a root for things that only its own have.
    layers = nn.ModuleList(policy.get_submodule(name) for name in names)
    inject_adapter_in_model(lora_config(settings, target_modules=r"\d+"), layers, ADAPTER)
    for name, layer in zip(names, layers, strict=True):
        policy.set_submodule(name, layer)
    policy.adapters = tuple(names)


@contextmanager
def set_aside(module: nn.Module, adapters: Sequence[str]) -> Iterator[list[Any]]:
    """While inside, `module` is what it was before it got the `adapters`, names included; yields peft's layers."""
    layers: dict[str, Any] = {name: module.get_submodule(name) for name in adapters}
    for name, layer in layers.items():
        module.set_submodule(name, layer.base_layer)
    try:
        yield list(layers.values())
    finally:
        for name, layer in layers.items():
            module.set_submodule(name, layer)


def with_adapter(name: str, adapters: Sequence[str]) -> str:
    """The name that a tensor of the policy has beside `adapters`."""
    module, _, tensor = name.rpartition(".")
    return f"{module}.base_layer.{tensor}" if module in adapters else name


def merge(policy: Policy) -> None:
    """Add the adapters to the weights of their layers and take them out."""
    with set_aside(policy, policy.adapters) as layers:
        for layer in layers:
            layer.merge()
    for name in policy.adapters:
        policy.set_submodule(name, policy.get_submodule(name).base_layer)  # type: ignore[arg-type]
    policy.adapters = ()


def summary(policy: Policy) -> str:
    """What trains, in one line."""
    sizes = {name: p.numel() for name, p in policy.named_parameters() if p.requires_grad}
    whole, trained = sum(p.numel() for p in policy.parameters()), sum(sizes.values())
    if trained == whole and not policy.adapters:
        return f"all {whole:,} train"
    text = f"{trained:,} train, {whole - trained:,} are frozen"
    if not policy.adapters:
        return text
    adapters = sum(size for name, size in sizes.items() if is_adapter(name))
    beside = f", and {trained - adapters:,} beside them" if trained > adapters else ""
    return f"{text}: LoRA adapters on {len(policy.adapters)} layers, {adapters:,}{beside}"


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is one of an adapter's."""
    return name.endswith((f".lora_A.{ADAPTER}.weight", f".lora_B.{ADAPTER}.weight"))
