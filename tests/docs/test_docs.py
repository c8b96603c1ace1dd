"""What the documents show works: links lead somewhere, commands are run by a test, code is run as it stands."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.program import DATA, REPO, TINY_POLICY, environment, metrics, train_here

DOCUMENTS = [REPO / "README.md", REPO / "CHANGELOG.md", *sorted((REPO / "docs").rglob("*.md"))]
GUIDES = [REPO / "README.md", *(REPO / "docs" / f"{name}.md" for name in ("quickstart", "multi-node", "scaling"))]

RUN_ELSEWHERE = {
    "make train": "tests/recipes/test_images_matter.py runs what it runs; make itself is .ci/run's",
    "make test": ".ci/run",
    "make setup": ".ci/run",
    "launchers/train_droid_policy.sh": "tests/launchers/test_launcher.py",
    "sbatch ": "tests/slurm/test_slurm.py",
    "scontrol ": "tests/slurm/test_slurm.py",
    "srun --nodes=4 --ntasks-per-node=1 launchers/": "tests/launchers/test_launcher.py and tests/slurm/test_slurm.py",
    "touch runs/": "tests/distributed/test_never_hang.py",
    ".venv/bin/tensorboard": "tests/unit/sinks reads the files back",
}


def commands() -> list[str]:
    found = []
    for document in GUIDES:
        for block in re.findall(r"```bash\n(.*?)```", document.read_text(), flags=re.S):
            found += [line for line in block.splitlines() if line.strip()]
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(REPO)))
def test_links_lead_to_files(document):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text()):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), target


@pytest.mark.parametrize("line", commands())
def test_every_command_of_the_guides_is_run_by_a_test(line, tmp_path):
    """Programs are asked for their configuration (`--cfg job`), which composes and checks every key of the line."""
    words = shlex.split(line)
    while re.match(r"^[A-Z_]+=", words[0]):
        words.pop(0)
    if any(" ".join(words).startswith(known) for known in RUN_ELSEWHERE):
        return
    if words[0].endswith("torchrun"):
        words = [sys.executable, *words[words.index("-m") :]]
    elif words[0].endswith("python"):
        words[0] = sys.executable
    if "opentau_train.tools.check" in words:
        words[-1] = str(DATA / "lerobot_v30")
    elif "--config-dir" in words:
        (tmp_path / "my_configs" / "recipe").mkdir(parents=True)
        (tmp_path / "my_configs" / "recipe" / "my_recipe.yaml").write_text(
            "# @package _global_\ndefaults:\n  - override /data: lerobot\ntrainer: {steps: 3}\n"
        )
        words += ["--cfg", "job"]
    elif "--cfg" not in words:
        words += ["--cfg", "job"]
    done = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", (REPO / "docs" / "extending.md").read_text(), flags=re.S)


def test_the_examples_of_extending_train_together(tmp_path, monkeypatch):
    """The document's sink, model and source, with its own YAML files, in one run."""
    code, configs = blocks("python"), blocks("yaml")
    for name, text in zip(("my_sinks", "my_models", "my_sources"), code, strict=True):
        (tmp_path / f"{name}.py").write_text(text)
    for name, text in zip(("logger/csv", "model/linear", "data/source/sine"), configs, strict=True):
        path = tmp_path / "configs" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    words = [sys.executable, "-m", "opentau_train", "--config-dir", str(tmp_path / "configs"), "+recipe=lerobot"]
    words += ["logger=[console,csv]", "model=linear", "+data/source@data.sources.sine=sine", "trainer.steps=3"]
    words += [f"data.sources.main.root={DATA / 'lerobot_v30'}", "trainer.log_every=1", "trainer.global_batch_size=4"]
    words += [
        f"paths.run_dir={tmp_path / 'run'}",
        "data.image_size=[32,32]",
        "data.num_workers=0",
        "validation.every=3",
    ]
    env = environment(PYTHONPATH=f"{REPO}{os.pathsep}{tmp_path}", OPENTAU_CACHE=str(tmp_path / "cache"))
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "run" / "tag.csv").read_text().splitlines()) == 3
    assert "Validation/sine/joint/MSE" in metrics(tmp_path / "run")[3]


def test_the_readme_names_what_a_run_leaves(tmp_path):
    """The table's files are there after a run."""
    run = train_here(
        ["+recipe=lerobot", "+debug=smoke", f"data.sources.main.root={DATA / 'lerobot_v30'}", *TINY_POLICY],
        tmp_path / "run",
    )
    for name in ("config.yaml", "metrics.jsonl", "tensorboard", "train.log", "checkpoints/last"):
        assert (run / name).exists() and f"`{Path(name).name.split('/')[-1]}" in (REPO / "README.md").read_text()
