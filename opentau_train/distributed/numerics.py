"""What float arithmetic the kernels may use."""

from __future__ import annotations

import os

import torch


def set_numerics(*, deterministic: bool, matmul_precision: str) -> None:
    """Set this process's float arithmetic, before CUDA starts: cuBLAS reads its workspace's size when its first handle
    is made.

    `matmul_precision` as torch.set_float32_matmul_precision; below `highest`, cuDNN's convolutions may use TF32 too.
    """
    if deterministic:
        # Without a fixed workspace cuBLAS may choose another algorithm each time, and torch refuses to call it.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.set_float32_matmul_precision(matmul_precision)
    torch.backends.cudnn.allow_tf32 = matmul_precision != "highest"
