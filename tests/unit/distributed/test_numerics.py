"""What float arithmetic a process gets."""

import os

import pytest
import torch

from opentau_train.distributed.numerics import set_numerics


@pytest.fixture(autouse=True)
def torchs_own(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def test_deterministic_kernels_get_the_workspace_that_cublas_needs_for_them():
    set_numerics(deterministic=False, matmul_precision="highest")
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ and not torch.are_deterministic_algorithms_enabled()
    set_numerics(deterministic=True, matmul_precision="highest")
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8" and torch.are_deterministic_algorithms_enabled()


def test_a_workspace_that_the_user_chose_stays(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    set_numerics(deterministic=True, matmul_precision="highest")
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


@pytest.mark.parametrize(("precision", "tf32"), [("highest", False), ("high", True), ("medium", True)])
def test_products_and_convolutions_get_the_precision_that_is_set(precision, tf32):
    set_numerics(deterministic=False, matmul_precision=precision)
    assert torch.get_float32_matmul_precision() == precision and torch.backends.cudnn.allow_tf32 == tf32
