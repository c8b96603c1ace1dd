"""The table of the closed loop: what its folder holds, in order, and how much of the whole that is."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.program import REPO


@pytest.fixture
def folder(tmp_path):
    def cell(name: str, reached: int, num: int = 10) -> None:
        out = tmp_path / "runs" / name / f"success-{num}"
        out.mkdir(parents=True)
        episodes = [{"success": i < reached, "steps": 3} for i in range(num)]
        (out / "rollout.json").write_text(json.dumps({"episodes": episodes}))

    cell("push-v3+flow_tiny+seeing+2400+0", 5)
    cell("reach-v3+flow_tiny+blind+2400+0", 2)
    cell("reach-v3+flow_tiny+seeing+2400+0", 9)
    cell("reach-v3+flow_tiny+seeing+2400+2", 8)
    cell("reach-v3+flow_tiny+seeing+100+0", 1)
    cell("reach-v3+lerobot_act+seeing+2400+0", 7)
    (tmp_path / "runs" / "reach-v3+act_tiny+seeing+2400+0").mkdir()  # trained, not played
    return tmp_path


@pytest.mark.slow
def test_seeds_are_put_together_and_only_cells_of_the_whole_are_counted(folder):
    command = [sys.executable, "benchmarks/closed_loop.py", "--folder", str(folder), "--only-print"]
    printed = subprocess.run(command, cwd=REPO, check=True, capture_output=True, text=True, timeout=300).stdout
    rows = [line.split(" | ") for line in printed.splitlines() if line.startswith("| ") and "task" not in line]
    told = [" ".join(row[:4]).removeprefix("| ") for row in rows]
    assert told == [
        "reach-v3 flow_tiny seeing 100",
        "reach-v3 flow_tiny seeing 2400",
        "reach-v3 flow_tiny blind 2400",
        "reach-v3 lerobot_act seeing 2400",
        "push-v3 flow_tiny seeing 2400",
    ]
    assert rows[1][4:] == ["85%", "64% to 95%", "9/10, 8/10 |"]
    assert "\n4 of 60 cells" in printed


def test_lerobots_environment_is_asked_for_where_it_is_missing(folder, monkeypatch):
    from argparse import Namespace

    monkeypatch.syspath_prepend(str(REPO / "benchmarks"))
    import closed_loop

    options = Namespace(lerobot=folder / "python", episodes=10, steps=2400)
    with pytest.raises(SystemExit, match=r"make \.venv/lerobot/\.installed"):
        closed_loop.lerobot(options, folder, folder / "run", "reach-v3", "seeing", 0)
