"""What a step costs: its time, its memory, its arithmetic, a trace of it, and the garbage collector's pauses."""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

log = logging.getLogger(__name__)

MIB = 2**20
COLLECT_EVERY = 100
"""Steps between two garbage collections of the main process."""

PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
}
"""{part of a card's name: its dense bfloat16 FLOP/s, by NVIDIA's data sheets}; the first that fits counts."""


# -- time ------------------------------------------------------------------------------------------------------------


class Stamp:
    """A moment in a device's queue of work; on a CPU, now. Taking one doesn't wait for the device."""

    def __init__(self, device: torch.device):
        self._event: torch.Event | None = None
        if device.type == "cpu":
            self._seconds = time.perf_counter()
        else:
            self._event = torch.Event(device, enable_timing=True)
            self._event.record()

    def seconds_since(self, earlier: Stamp) -> float:
        """The device's seconds from `earlier` to this moment; it must have passed both."""
        if self._event is None or earlier._event is None:
            return self._seconds - earlier._seconds
        return earlier._event.elapsed_time(self._event) / 1000


# -- memory ----------------------------------------------------------------------------------------------------------


def memory_row(device: torch.device) -> dict[str, float]:
    """`Memory/...` in MiB: the host memory that this process holds, without its data workers (absent where there is no
    /proc), and the most memory held on a CUDA device since the last row."""
    row = {}
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS:"))
        row["Memory/HostRSS"] = int(line.split()[1]) / 1024
    if device.type == "cuda":
        row["Memory/DeviceAllocatedPeak"] = torch.cuda.max_memory_allocated(device) / MIB
        row["Memory/DeviceReservedPeak"] = torch.cuda.max_memory_reserved(device) / MIB
        torch.cuda.reset_peak_memory_stats(device)
    return row


@contextmanager
def scheduled_collection() -> Iterator[Callable[[int], None]]:
    """While inside, garbage is collected only by the yielded function, which is called with every step and collects in
    each `COLLECT_EVERY`-th: all ranks then pause in the same step, instead of each in another one that the others wait
    in. Objects that exist on entering are never looked at, so that data workers keep sharing their pages; what a
    caller has frozen stays frozen."""
    frozen = gc.get_freeze_count() > 0

    def collect(step: int) -> None:
        if step % COLLECT_EVERY == 0:
            gc.collect()

    gc.collect()
    if not frozen:
        gc.freeze()
    gc.disable()
    try:
        yield collect
    finally:
        gc.enable()
        if not frozen:
            gc.unfreeze()


# -- arithmetic ------------------------------------------------------------------------------------------------------


def attention_flops(q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Operations of attention over q [..., n, Q, d], k [..., m, K, d] and v [..., m, K, e]: 2 n Q K (d + e) a sample.
    torch's own formula refuses queries of more heads than the keys have (m < n)."""
    *heads, queries, width = q
    return 2 * math.prod(heads) * queries * k[-2] * (width + v[-1])


ATTENTION = (
    torch.ops.aten._scaled_dot_product_efficient_attention,
    torch.ops.aten._scaled_dot_product_flash_attention,
    torch.ops.aten._scaled_dot_product_cudnn_attention,
)


class ForwardFlops:
    """Counts the floating-point operations a sample of the first forward pass that is made inside `counting`.

    Matrix products, convolutions and attention are counted, from their shapes. The pass runs uncompiled: a compiled
    one would be counted as nothing.
    """

    per_sample: float | None = None

    @contextmanager
    def counting(self, num_samples: int) -> Iterator[None]:
        if self.per_sample is not None:
            yield
            return
        counter = FlopCounterMode(display=False, custom_mapping=dict.fromkeys(ATTENTION, attention_flops))
        with torch.compiler.set_stance("force_eager"), counter:
            yield
        self.per_sample = counter.get_total_flops() / num_samples


def utilization(forward_flops: float, num_samples: float, seconds: float, device_name: str) -> float | None:
    """Model FLOPs utilisation (Chowdhery et al. 2022, appendix B): three forward passes' operations for each sample,
    without what activation checkpointing computes again, over a device's dense bfloat16 peak. None for a card of no
    known peak."""
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in device_name), None)
    return None if peak is None else 3 * forward_flops * num_samples / seconds / peak


# -- trace -----------------------------------------------------------------------------------------------------------

WARMUP = 3
"""Steps before the first one that is traced: compilation, caches, the first batches."""


@contextmanager
def traced(path: Path, steps: int) -> Iterator[Callable[[], None]]:
    """Call the yielded function after each step: `steps` of them, after the first `WARMUP`, are recorded by
    torch.profiler into `path`, a Chrome trace (open it in https://ui.perfetto.dev). 0 records nothing."""
    if steps == 0:
        yield lambda: None
        return

    def write(profiler: torch.profiler.profile) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))
        log.info("wrote %s: open it in https://ui.perfetto.dev", path)

    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    schedule = torch.profiler.schedule(wait=WARMUP - 1, warmup=1, active=steps, repeat=1)
    with torch.profiler.profile(activities=activities, schedule=schedule, on_trace_ready=write) as profiler:
        yield profiler.step
    if not path.exists():
        log.warning("no step was traced: the run ended within the first %d", WARMUP)
