"""Started by torchrun with `agree` or `lose`: asserts on every rank what a vote gives, and what a rank's loss does.

0 -- 1 -- 3      the tree of four ranks
  `- 2
"""

import os
import sys
import time

import pytest
import torch.distributed as dist

from opentau_train.distributed.consensus import Ballot, Vote
from opentau_train.distributed.rollcall import is_broken_collective
from opentau_train.distributed.stopping import Stop
from opentau_train.distributed.world import World, launch
from opentau_train.errors import UserError


def agree(world: World) -> None:
    rank = world.rank
    numbers = {"num_substituted": rank, "num_cut": 2 * rank, "num_tokens": 3 * rank}
    vote = Vote({"mse": 10.0**rank, "ce": 0.5}, **numbers, num_micro_batches=[1, 2, 5, 3][rank])
    agreed = Ballot(vote, world).result()
    assert agreed.num_tokens == 18 and agreed.num_micro_batches == 5, "the most of any rank, no sum"
    assert agreed.counts == {"mse": 1111.0, "ce": 2.0} and agreed.num_substituted == 6 and agreed.num_cut == 12
    assert agreed.take_step and agreed.stop is Stop.NONE and not agreed.all_written

    for written in ({0, 1, 2}, {0, 1, 2, 3}):
        agreed = Ballot(Vote({}, has_written=rank in written), world).result()
        assert agreed.all_written == (len(written) == 4)

    asked = [Stop.NONE, Stop.PREEMPTED, Stop.NONE, Stop.INTERRUPTED][rank]
    agreed = Ballot(Vote({}, stop=asked, has_batch=rank != 2), world).result()
    assert agreed.stop is Stop.INTERRUPTED and not agreed.take_step
    assert Ballot(Vote({}, stop=Stop(rank == 3)), world).result().stop is Stop.PREEMPTED

    error = UserError(f"no file on {rank}") if rank in (1, 3) else None
    with pytest.raises(UserError, match="no file on 1"):
        Ballot(Vote({}, error=error), world).result()


def lose(world: World) -> None:
    """Rank 3 ends. Only rank 1 has a connection to it, and stays where it is for a while; the others hear of it."""
    Ballot(Vote({}), world).result()
    if world.rank == 3:
        os._exit(0)
    with pytest.raises(RuntimeError) as lost:
        Ballot(Vote({}), world).result()
    assert is_broken_collective(lost.value), lost.value
    store = dist.distributed_c10d._get_default_store()
    store.add("heard", 1)
    while store.add("heard", 0) < 3:  # 0 and 2 must hear while rank 1, their only way to rank 3, is still there
        time.sleep(0.05)


if __name__ == "__main__":
    with launch(device="cpu", precision="no", timeout=60, identity={}) as world:
        {"agree": agree, "lose": lose}[sys.argv[1]](world)
        print("held", flush=True)
        os._exit(0)  # as the program ends: gloo's destructors may hang
