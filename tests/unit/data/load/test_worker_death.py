"""A data worker that dies while its batch is being handed over: torch sees a broken connection first."""

import itertools
import os
import signal
import threading
from contextlib import closing

import pytest
from torch.utils.data import IterableDataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from opentau_train.data.load import workers
from opentau_train.errors import Fault


class Numbers(IterableDataset):
    def __iter__(self):
        return itertools.count()


@pytest.mark.parametrize("error", [ConnectionResetError, EOFError, FileNotFoundError])
def test_a_connection_that_breaks_before_the_worker_is_gone_tells_of_its_death(error, monkeypatch):
    parts = workers.one_pass(Numbers(), 1, 2)
    assert next(parts) == 0

    def broken(self, *_):
        threading.Timer(0.3, os.kill, (self._workers[0].pid, signal.SIGKILL)).start()
        raise error("while a tensor was on its way")

    monkeypatch.setattr(_MultiProcessingDataLoaderIter, "_try_get_data", broken)
    with closing(parts), pytest.raises(Fault, match=r"a data worker on .* died \(pid \d+, killed by SIGKILL\)"):
        list(itertools.islice(parts, 9))  # a few are there already


def test_a_broken_connection_of_living_workers_stays_what_it_is(monkeypatch):
    monkeypatch.setattr(workers, "GONE_S", 0.1)
    parts = workers.one_pass(Numbers(), 2, 2)
    assert next(parts) == 0

    def broken(self, *_):
        raise ConnectionResetError("another one's")

    monkeypatch.setattr(_MultiProcessingDataLoaderIter, "_try_get_data", broken)
    with closing(parts), pytest.raises(ConnectionResetError, match="another one's"):
        list(itertools.islice(parts, 9))
