"""What a run will do, in a line: learning rate, batch, steps, epochs."""

from __future__ import annotations

import math

from opentau_train.config.settings import Settings


def budget(settings: Settings, ranks: int, max_samples: int, num_windows: int) -> str:
    """The run's peak learning rate and what it is made of, its global batch as samples x ranks x micro-batches, its
    samples, epochs of `num_windows` windows, and where it has seen `trainer.reference_samples`."""
    trainer, optimizer = settings.trainer, settings.optimizer
    batch, rate = trainer.global_batch_size, optimizer.rate(trainer.global_batch_size)
    factor = {"none": "", "linear": "{} / {}", "sqrt": "sqrt({} / {})"}[optimizer.lr_scaling]
    made = f" = {optimizer.lr:g} x {factor.format(batch, optimizer.reference_batch)}" if factor else ""
    share = batch // ranks
    micro = math.ceil(share / max_samples)
    samples = trainer.steps * batch
    line = (
        f"learning rate {rate:g}{made}; batch {batch:,} = {share / micro:g} samples x {ranks} ranks x {micro} "
        f"micro-batches; {trainer.steps:,} steps = {samples:,} samples = {samples / num_windows:.3g} epochs"
    )
    cap = settings.data.max_num_tokens_after_packing
    if cap != -1:
        line += f"; micro-batches of at most {cap:,} tokens, so that there may be more"
    if trainer.reference_samples is not None:
        reached = trainer.reference_samples / batch
        line += f"; the reference's {trainer.reference_samples:,} samples: step {reached:,.0f}"
    return line
