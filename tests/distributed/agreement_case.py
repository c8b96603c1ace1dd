"""Run by torchrun: what each rank is told when one of a node's later ranks can't make what the first one could."""

import sys

from opentau_train.distributed.world import launch
from opentau_train.errors import Explained, Fault, UserError


def main() -> None:
    with launch(device="cpu", precision="no", timeout=60.0, identity={}) as world:

        def make(kind: type[Explained]) -> int:
            if world.local_rank == 1:
                raise kind("no room on this process's disk", where="here")
            return 7

        for kind in (UserError, Fault):
            try:
                world.once_a_node(lambda kind=kind: make(kind))
            except kind as error:
                sys.stdout.write(f"rank {world.rank}: {kind.__name__} {error.what} {error.where}\n")
        assert world.once_a_node(lambda: world.local_rank) == world.local_rank


if __name__ == "__main__":
    main()
