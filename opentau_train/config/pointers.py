"""Keys of neighbouring programs that users type here by habit, and the keys that do the same here.

Looked up only where a key is unknown already. `tests/unit/config/test_pointers.py` holds that each one leads to a key
that exists.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

POLICY = "model=flow_base"
BATCH = "over all ranks and micro-batches; data.max_samples_per_batch bounds a rank's micro-batch"
WEIGHTS = ("model.pretrained_path", "a safetensors file, a directory or a name on the Hub; docs/models.md")
CAP = ("data.max_num_tokens_after_packing", "with model.packing=true")
TRACKER = "also wandb, mlflow, trackio, swanlab and console"

DEGREES = ("data_parallel_replicate_degree", "data_parallel_shard_degree")
OF_A_SOURCE = ("root", "repo_id", "use_filter_dict", "filter_dict_path", "filter_key")
COSMOS_SOURCE = ("root", "chunk_length", "fps", "tolerance_s", "use_filter_dict", "filter_dict_path")


def of_source(key: str) -> tuple[str, str]:
    """The entry for a setting of one source."""
    return f"data.sources.NAME.{key}", "NAME is droid with data=droid, main with data=lerobot"


POINTERS: dict[str, tuple[str, str]] = {
    # cosmos-framework: variables of its launchers, then keys of its configuration
    "VLM_SAFETENSORS_PATH": ("model.vlm_path", "or set it in the environment; for a model with a VLM inside"),
    "BASE_CHECKPOINT_PATH": WEIGHTS,
    "WAN_VAE_PATH": (POLICY, "policies here have no video autoencoder"),
    **{f"model.config.parallelism.{key}": (f"parallelism.{key}", "") for key in DEGREES},
    "model.config.parallelism.*": ("parallelism=hsdp", f"or ddp or fsdp; they have {' and '.join(DEGREES)}"),
    **{f"dataloader_train.dataloader.datasets.droid.dataset.{key}": of_source(key) for key in COSMOS_SOURCE},
    "dataloader_train.dataloader.datasets.droid.dataset.use_success_only": of_source("success_only"),
    "dataloader_train.max_samples_per_batch": ("data.max_samples_per_batch", ""),
    "dataloader_train.num_workers": ("data.num_workers", ""),
    **{f"{section}max_num_tokens_after_packing": CAP for section in ("", "model.config.", "dataloader_train.")},
    "trainer.max_iter": ("trainer.steps", ""),
    "trainer.logging_iter": ("trainer.log_every", ""),
    "trainer.grad_accum_iter": ("trainer.global_batch_size=1024", BATCH),
    "checkpoint.save_iter": ("checkpoint.every", ""),
    "job.name": ("name", ""),
    # the settings of one source, taken for those of all
    **{f"data.{key}": of_source(key) for key in OF_A_SOURCE},
    # lerobot-train
    **{f"dataset.{key}": of_source(key) for key in ("root", "repo_id", "revision", "episodes")},
    "policy.type": (POLICY, "or flow_tiny, flow_small; a class of your own: docs/extending.md"),
    "policy.path": WEIGHTS,
    "policy.pretrained_path": WEIGHTS,
    "pretrained_path": WEIGHTS,
    "policy.device": ("trainer.device=auto", "or cpu"),
    "policy.chunk_size": ("data.chunk_length", ""),
    "policy.optimizer_lr": ("optimizer.lr", ""),
    "steps": ("trainer.steps", ""),
    "batch_size": ("trainer.global_batch_size", BATCH),
    "num_workers": ("data.num_workers", "of each rank"),
    "save_freq": ("checkpoint.every", ""),
    "eval_freq": ("validation.every", ""),
    "log_freq": ("trainer.log_every", ""),
    "output_dir": ("paths.run_dir", ""),
    "job_name": ("name", ""),
    "wandb.enable": ("logger=[default,wandb]", TRACKER),
    "--resume": ("resume=auto", "or the PATH of a run or a checkpoint"),
    # openpi
    "exp_name": ("name", ""),
    "num_train_steps": ("trainer.steps", ""),
    "save_interval": ("checkpoint.every", ""),
    "log_interval": ("trainer.log_every", ""),
    "checkpoint_base_dir": ("paths.root", ""),
    "fsdp_devices": ("parallelism.data_parallel_shard_degree", ""),
    "wandb_enabled": ("logger=[default,wandb]", TRACKER),
}
"""{key of the other program: (key or override here, a note)}. `*` ends a key with any rest; with `=` here is a value of
its own, without it the other's is kept."""


def pointer(key: str, value: Any = None) -> str | None:
    """What to write in place of `key`, with or without dashes before it; None where no program has such a key."""
    name = key.lstrip("-+").replace("-", "_")
    spellings = (f"--{name}" if key.startswith("--") else name, name, f"{name.rpartition('.')[0]}.*")
    known = next((spelling for spelling in spellings if spelling in POINTERS), None)
    if known is None:
        return None
    target, note = POINTERS[known]
    override = target if "=" in target else f"{target}={_written(value)}"
    return f"write {override}" + (f" ({note})" if note else "")


def pointers(key: str, value: Any) -> str | None:
    """The same for all keys below an unknown one: `dataset` with {"repo_id": ...}."""
    texts = [text for name, leaf in _leaves(key, value) if (text := pointer(name, leaf)) is not None]
    return "; ".join(dict.fromkeys(texts)) or None


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _leaves(f"{key}.{name}", inner)
    else:
        yield key, value


def _written(value: Any) -> str:
    """The value as an override has it."""
    if value is None:
        return "VALUE"
    return str(value).lower() if isinstance(value, bool) else str(value).replace(" ", "")
