"""Several simulators of one environment, each in its process; one that crashes or hangs is replaced and counted."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from opentau_train.errors import Fault
from opentau_train.simulation.process import SimulatorLost, SimulatorProcess

log = logging.getLogger(__name__)

TRIES = 3
"""How often one episode may be begun: what ends its simulator each time is no accident."""


class Pool:
    """`num` simulators of the environment that `tree` declares, numbered from 0; `timeout` seconds are the longest that
    an answer may take. `lost`: how many were replaced so far. Close it to end the processes."""

    def __init__(self, tree: dict[str, Any], num: int, timeout: float):
        self.tree, self.timeout, self.lost = tree, timeout, 0
        self._processes = [SimulatorProcess(tree, timeout) for _ in range(num)]

    def __len__(self) -> int:
        return len(self._processes)

    def ask(self, calls: Mapping[int, tuple[Any, ...]]) -> dict[int, Any]:
        """Call a method of each of some simulators ({number: (method, arguments ...)}), all at once. An answer is None
        where the simulator was lost; a new one stands in its place. Raises the `UserError` of a call."""
        for i, call in calls.items():
            self._processes[i].ask(*call)
        return {i: self._answer(i) for i in calls}

    def run(self, calls: Mapping[int, tuple[Any, ...]]) -> dict[int, Any]:
        """As `ask`, of calls that stand for themselves: one whose simulator was lost is made again, by a new one.
        Raises `Fault` where that fails as well, `TRIES` times in all."""
        answers: dict[int, Any] = {}
        for _ in range(TRIES):
            answers |= self.ask({i: call for i, call in calls.items() if answers.get(i) is None})
            if None not in answers.values():
                return {i: answers[i] for i in calls}
        raise self.given_up()

    def given_up(self) -> Fault:
        """What to raise where an episode was begun `TRIES` times."""
        return Fault(
            f"one episode's simulator was lost {TRIES} times: {self._cause}",
            where=f"env {self.tree['env']}",
            remedy="see to the simulator; where it only is slow, raise the timeout",
        )

    def close(self) -> None:
        for process in self._processes:
            process.close()

    def _answer(self, i: int) -> Any:
        try:
            return self._processes[i].answer()
        except SimulatorLost as cause:
            log.warning("a simulator is replaced: %s", cause)
            self._cause = str(cause)
            self.lost += 1
            self._processes[i].close()
            self._processes[i] = SimulatorProcess(self.tree, self.timeout)
            return None
