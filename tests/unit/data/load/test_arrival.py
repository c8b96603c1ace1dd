"""Batches on their way to the device: their counts are those of the host's copy, errors travel as values."""

import pytest
import torch

from opentau_train.data.load.arrival import arrivals
from opentau_train.data.load.stream import RankBatch
from opentau_train.errors import UserError
from tests.unit.models.flow_cases import make_batch, make_policy

CPU = torch.device("cpu")


def test_a_part_arrives_with_the_counts_of_its_masks():
    policy, batch = make_policy(), make_batch()
    (arrival,) = arrivals((part for part in [RankBatch(batch, num_substituted=2)]), policy, CPU)
    expected = {term: float(count.sum()) for term, count in policy.term_counts(batch).items()}
    assert arrival.counts == expected and arrival.counts["mse"] > 0
    assert arrival.part.num_substituted == 2 and torch.equal(arrival.on_device().actions, batch.actions)


def refuse(batch):
    raise UserError("the policy can't count a dance")


def test_an_error_of_the_counts_travels_as_the_streams_do():
    """Raised on one rank alone it would leave the others in the vote."""
    policy = make_policy()
    policy.term_counts = refuse
    arrival = next(arrivals((part for part in [RankBatch(make_batch())]), policy, CPU))
    assert isinstance(arrival.part.error, UserError) and "dance" in str(arrival.part.error)
    assert arrival.counts == {"mse": 0.0, "ce": 0.0}


def test_closing_ends_the_stream_behind():
    ended = []

    def stream():
        try:
            while True:
                yield RankBatch(make_batch())
        finally:
            ended.append(True)

    arriving = arrivals(stream(), make_policy(), CPU)
    next(arriving)
    arriving.close()
    assert ended


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_the_copy_comes_from_pinned_memory_beside_the_computation():
    batch = make_batch()
    torch.cuda.set_sync_debug_mode("error")
    try:
        (arrival,) = arrivals((part for part in [RankBatch(batch)]), make_policy(), torch.device("cuda", 0))
        copy = arrival.on_device()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert copy.actions.is_cuda and torch.equal(copy.actions.cpu(), batch.actions)
