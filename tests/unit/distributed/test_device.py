"""`trainer.device=cuda` trains on a card or not at all."""

import pytest
import torch

from opentau_train.distributed.world import launch
from opentau_train.errors import UserError


def test_cuda_that_was_asked_for_and_is_missing_is_an_error_not_a_slow_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    launched = launch(device="cuda", precision="no", timeout=60, identity={})
    with pytest.raises(UserError, match="sees no CUDA device") as caught, launched:
        pass
    assert caught.value.where == "trainer.device" and "auto" in caught.value.remedy
