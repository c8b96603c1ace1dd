"""What the documents show works: links lead somewhere, commands are run by a test, code is run as it stands."""

import importlib
import json
import os
import re
import shlex
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import ClassVar

import pytest

from opentau_train import cli, validate
from opentau_train.config.settings import load_settings
from opentau_train.data.builtin.droid import SampleSpec, ensure_droid_sample
from opentau_train.sinks.base import Sink
from tests import warm
from tests.lerobot_writer import Dataset, vector, write
from tests.program import DATA, REPO, TOY, environment, metrics, train_here

ROOT = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
DOCUMENTS = [*(REPO / name for name in ROOT), *sorted((REPO / "docs").rglob("*.md"))]
RUN_ELSEWHERE = {
    "make test-nightly": "tests/property",
    "make mutants": "tests/unit/test_mutants.py",
    "make": ".ci/run",
    "docker": "tests/launchers/test_image.py",
    "kubectl apply": "tests/launchers/test_shipped.py",
    "sky launch": "tests/launchers/test_shipped.py",
    "python launchers/slurm/sweep.py": "tests/launchers/test_sweep.py",
    "opentau-train launcher": "tests/unit/tools/test_launcher_copy.py",
    "python -m tests.licences": "tests/docs/test_site.py",
    "launchers/train_droid_policy.sh": "tests/launchers/test_launcher.py",
    "torchrun --nproc-per-node 2 -m opentau_train +recipe=lerobot data.sources.main": "tests/unit/test_cli.py",
    "launchers/slurm/train.sbatch": "tests/slurm",
    "sbatch": "tests/slurm",
    "srun": "tests/slurm",
    "scontrol": "tests/slurm",
    "touch runs/slurm-1234/PREEMPT": "tests/distributed/test_never_hang.py",
    ".venv/bin/tensorboard": "tests/unit/sinks",
    "python -m tests.docs.configuration": "tests/unit/config/test_reference.py",
    "python -m opentau_train --multirun": "tests/unit/test_sweep.py",
    "python -m opentau_train.tools.plan +recipe=droid_policy model=pi0": "tests/unit/distributed/test_memory_of_pi.py",
    "python -m opentau_train.tools.demos": "tests/unit/simulation/test_demonstrations.py",
    "python -m opentau_train.tools.rollout": "tests/unit/simulation/test_evaluator.py",
    "python -m opentau_train.tools.export checkpoint=RUN format=onnx": "tests/unit/deploy/test_graph.py",
    "python -m opentau_train.tools.serve": "tests/unit/deploy/test_documents.py",
    "python -m opentau_train.tools.record": "tests/unit/deploy/test_documents.py",
    "python -m opentau_train.tools.inspect +recipe=lerobot data.sources.main.root=/data/my_dataset --rerun": (
        "tests/unit/tools/test_inspect_page.py"
    ),
    "python -m opentau_train.tools.reencode": "tests/unit/tools/test_reencode.py",
    "hf auth login": "tests/unit/tools/test_push.py",
    "python -m opentau_train.tools.push": "tests/unit/tools/test_push.py",
    "python -m opentau_train.tools.replay RUN": "tests/unit/tools/test_replay.py",
    "python -m opentau_train.tools.replay_dataset": "tests/unit/deploy/test_documents.py",
    "python -m opentau_train.tools.verify_resume": "tests/unit/tools/test_verify_resume.py",
    "python -m opentau_train.tools.verify": "tests/unit/checkpoints/test_manifest.py",
}
"""Commands that the named tests run, because they need more than a moment, a second machine or a fresh one."""

WHOLE = {"docs/droid.md": "tests/docs/test_droid.py"}
"""Documents whose blocks the named tests run as they stand."""

UNTESTED = re.compile(
    r"^[\s$>]*(?:[A-Z_]+=\S* +)*(?:\S*/)?(?:python[0-9.]* (?:-m|benchmarks/)|torchrun -|launchers/\S+\.(?:sh|sbatch)\b"
    r"|(?:sbatch|srun) -|scontrol (?:requeue|show|update)\b|make [a-z-]+(?: [A-Z]+=.*)?$)"
)
"""How a line begins that is a command. Lines of bash blocks are run; prose shows a command between backticks."""

TOOLS = ("check", "curate", "export", "inspect", "keep_ranges", "plan", "report", "why")
"""Tools that run here, on a small run and a small dataset."""


def commands() -> list[str]:
    """Every command of the documents: the lines of their bash blocks, and what their prose shows between backticks."""
    found = []
    for document in DOCUMENTS:
        if str(document.relative_to(REPO)) in WHOLE:
            continue
        text = document.read_text().replace("\\\n", " ")
        for block in re.findall(r"^ *```bash\n(.*?)^ *```", text, flags=re.S | re.M):
            found += [line.strip() for line in block.splitlines() if line.strip() and not line.lstrip().startswith("#")]
        prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.S | re.M)
        found += re.findall(
            r"`((?:python -m|python benchmarks|torchrun|make|launchers/|sbatch|srun|scontrol)[ /][^`]*)`", prose
        )
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(REPO)))
def test_links_lead_to_files(document):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text()):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(REPO)))
def test_no_command_stands_where_no_test_finds_it(document):
    """In an indented block or a fence of another kind a command would be run by nobody."""
    rest = re.sub(r"^ *```bash\n.*?^ *```", "", document.read_text(), flags=re.S | re.M)
    assert not [line for line in rest.splitlines() if UNTESTED.match(line)], "these belong into a ```bash block"


@pytest.mark.parametrize(
    ("line", "command"),
    [
        ("    python -m opentau_train.tools.plan +recipe=droid_policy", True),
        ("DROID_ROOT=/data .venv/bin/python -m opentau_train", True),
        ("$ python benchmarks/memory.py", True),
        ("torchrun --nproc-per-node 8 -m opentau_train", True),
        ("A=1 launchers/train_droid_policy.sh", True),
        ("make test-slow ARGS=-x", True),
        ("scontrol requeue 1234", True),
        ("`python -m opentau_train --help` lists every key.", False),
        ("torchrun itself ends with 1 when a rank ends with any code but 0", False),
        ("make the error smaller.", False),
    ],
)
def test_a_command_is_told_from_prose(line, command):
    assert bool(UNTESTED.match(line)) == command


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of two steps, where documents say RUN."""
    folder = tmp_path_factory.mktemp("docs")
    # A small built-in sample stands at the place of the whole one, which takes half a minute to make.
    spec = SampleSpec(num_episodes=4, min_frames=60, max_frames=70, episodes_per_data_file=2, episodes_per_video_file=2)
    small = ensure_droid_sample(folder / "small", spec)["joint"].parent
    shutil.copytree(small, folder / "cache" / f"droid_sample-{SampleSpec().stamp}")
    short = ["trainer.steps=2", "validation.every=2", "validation.max_samples_per_group=4", "flight_recorder=true"]
    return train_here([*TOY, *short], folder / "RUN")


@pytest.mark.slow
@pytest.mark.parametrize("line", commands())
def test_every_command_of_the_documents_is_run_by_a_test(line, finished, tmp_path, monkeypatch):
    """The training program's configuration is composed and every key of the line checked; tools and validations run;
    benchmarks, which take minutes, say whether they know the line's options; what can't is run by another test. All in
    this process, but for options that the program answers itself. A command of no known form fails."""
    words = shlex.split(re.sub(r" *\[KEY=VALUE ...\]", "", line).replace("+recipe=NAME", "+recipe=lerobot"))
    while re.match(r"^[A-Z_]+=", words[0]):
        words.pop(0)
    elsewhere = [place for known, place in RUN_ELSEWHERE.items() if " ".join(words).startswith(known)]
    if elsewhere:
        assert (REPO / elsewhere[0]).exists()
        return
    if any(word.startswith("benchmarks/") for word in words):
        knows_its_options(words)
        return
    assert Path(words[0]).name in ("python", "torchrun") and "-m" in words, "a command of no known form"
    _, module, *arguments = words[words.index("-m") :]
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DROID_ROOT", raising=False)
    monkeypatch.setenv("OPENTAU_CACHE", str(finished.parent / "cache"))
    own = [argument for argument in arguments if argument.startswith("-") and argument != "--config-dir"]
    if module == "opentau_train" and arguments and not own:
        load_settings(cli.compose(asked_for(arguments, tmp_path)))
    elif module == "opentau_train.validate" and arguments:
        assert validate.run(filled_in(arguments, finished, tmp_path)) == 0
    elif module != "opentau_train" and arguments:
        assert module in {f"opentau_train.tools.{tool}" for tool in TOOLS}, module
        assert importlib.import_module(module).main(filled_in(arguments, finished, tmp_path)) == 0
    else:
        words = [sys.executable, "-m", module, *(arguments or ["--help"])]
        done = warm.run(words, cwd=tmp_path, env=environment(), timeout=120)
        assert done.returncode == 0, done.stderr


@cache
def usage(script: str) -> str:
    """What a benchmark answers to --help."""
    words = [sys.executable, str(REPO / script), "--help"]
    done = warm.run(words, env=environment(), timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def knows_its_options(words: list[str]) -> None:
    place = next(i for i, word in enumerate(words) if word.startswith("benchmarks/"))
    for option in (word for word in words[place + 1 :] if word.startswith("--")):
        assert option in usage(words[place]), f"{words[place]} has no option {option}"
    assert usage(words[place])


def asked_for(arguments: list[str], folder: Path) -> list[str]:
    """The arguments, with the configuration directory that they name made in `folder`."""
    if "--config-dir" in arguments:
        recipes = folder / arguments[arguments.index("--config-dir") + 1] / "recipe"
        recipes.mkdir(parents=True)
        text = "# @package _global_\ndefaults:\n  - override /data: lerobot\ntrainer: {steps: 3}\n"
        (recipes / "my_recipe.yaml").write_text(text)
    return arguments


def filled_in(arguments: list[str], run: Path, folder: Path) -> list[str]:
    """The arguments of a tool with the documents' placeholders replaced by a real run, dataset, step and file."""
    return [real(before, argument, run, folder) for before, argument in zip(["", *arguments], arguments)]


def real(before: str, argument: str, run: Path, folder: Path) -> str:
    """One of them; `before` is the argument that it follows."""
    key, equals, value = argument.rpartition("=")
    if value == "RUN" or value.startswith(("RUN/", "runs/")):
        value = str(run / "checkpoints" / "last" if "checkpoints/" in value else run)
    elif value in ("PATH", "/data/my_dataset"):
        value = str(DATA / "lerobot_v30")
    elif value == "ROOT":
        velocities = {"observation.state": vector(4), "action.joint_velocity": vector(7)}
        value = str(write(folder / value, Dataset(lengths=(60, 40), cameras={}, columns=velocities)))
    elif value == "STEP" or before == "--step":
        value = "2"
    elif value == "FILE" or Path(value).suffix in (".json", ".html", ".png", ".safetensors"):
        value = str(folder / value)
    return f"{key}{equals}{value}"


def examples() -> dict[str, str]:
    """{file: text} of the examples of docs/extending.md: a block's file is the last one named before it."""
    text, files = (REPO / "docs" / "extending.md").read_text(), {}
    for before, kind, block in re.findall(r"(.*?)^```(python|yaml)\n(.*?)^```", text, flags=re.S | re.M):
        names = re.findall(rf"`([a-z_/]+\.{'py' if kind == 'python' else 'yaml'})`(?: of `([a-z_/]+)`)?", before)
        name, folder = names[-1]
        files[f"{folder}{name}"] = block
    return files


def test_each_example_of_extending_is_short():
    assert {name: len(text.splitlines()) for name, text in examples().items() if len(text.splitlines()) >= 40} == {}


@pytest.mark.slow
def test_the_examples_of_extending_train_together(tmp_path):
    """The document's sink, policy, optimizer, source, transform and field, with its own YAML files, in one run."""
    for name, text in examples().items():
        path = tmp_path / name if name.endswith(".py") else tmp_path / "configs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    words = [
        sys.executable,
        "-m",
        "opentau_train",
        "--config-dir",
        str(tmp_path / "configs"),
        "+recipe=[lerobot,clocked]",
    ]
    words += [
        "logger=[console,csv]",
        "model=linear",
        "optimizer=lion",
        "+data/source@data.sources.sine=sine",
        "trainer.steps=3",
    ]
    words += [f"data.sources.main.root={DATA / 'lerobot_v30'}", "trainer.log_every=1", "trainer.global_batch_size=4"]
    words += [
        f"paths.run_dir={tmp_path / 'run'}",
        "data.image_size=[32,32]",
        "data.num_workers=0",
        "validation=smooth",
        "validation.every=3",
    ]
    env = environment(PYTHONPATH=f"{REPO}{os.pathsep}{tmp_path}", OPENTAU_CACHE=str(tmp_path / "cache"))
    done = warm.run(words, cwd=tmp_path, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "run" / "tag.csv").read_text().splitlines()) == 3
    row = metrics(tmp_path / "run")[3]
    assert "Validation/sine/joint/MSE" in row and row["Validation-Smoothness/sine/joint"] > 0
    card = json.loads((tmp_path / "run" / "checkpoints" / "last" / "pretrained_model" / "policy.json").read_text())
    assert any(entry["_target_"] == "my_transforms.Clock" for entry in card["transforms"]["sine"])
    assert re.search(r"^sine +12 ", done.stderr, flags=re.M), "the source's own option is followed"
    for key, text in (("num_episode=3", "did you mean 'num_episodes'?"), ("success_only=true", "doesn't follow")):
        also = [f"paths.run_dir={tmp_path / 'refused'}", f"data.sources.sine.{key}"]
        refused = warm.run([*words, *also], cwd=tmp_path, env=env, timeout=120)
        assert refused.returncode == 2 and text in refused.stderr, refused.stderr


class Onlooker(Sink):
    """Keeps what lies in the run directory while the run goes on."""

    seen: ClassVar[set[str]] = set()

    def __init__(self, *, context):
        self.run_dir = context.run_dir

    def write(self, step, row):
        self.seen.update(left_by(self.run_dir))


def left_by(run_dir: Path) -> set[str]:
    """The names in a run directory, and those in its checkpoints' folder, whose steps are all called 00001000."""
    inside = (re.sub(r"^\d{8}", "00001000", path.name) for path in (run_dir / "checkpoints").glob("*"))
    return {p.name for p in run_dir.iterdir()} - {"checkpoints"} | {f"checkpoints/{name}" for name in inside}


ELSEWHERE = {"PREEMPT", "wandb", "wandb_kept_step", "mlflow_run_id"}
"""What a person, or a tracker that isn't chosen here, would leave: tests/distributed, tests/unit/sinks."""


@pytest.mark.slow
def test_the_table_of_the_readme_is_what_runs_leave(tmp_path):
    """One that has everything, is preempted, loses the end of its numbers, and goes on."""
    root = shutil.copytree(DATA / "lerobot_v21", tmp_path / "damaged")
    (video,) = root.rglob("episode_000002.mp4")
    video.chmod(0o644)
    video.write_bytes(video.read_bytes()[:200])
    words = [*TOY, f"data.sources.old.root={root}", "data.sources.old.val_episodes=[0]"]
    words += ["data.bad_samples.max_fraction=0.9", "trainer.profile_steps=1", "flight_recorder=true"]
    words += ["validation.every=4", "validation.evaluators=[loss,action]", "validation.max_samples_per_group=4"]
    words += ["trainer.steps=8", "trainer.global_batch_size=16"]
    words += [f"+logger.onlooker._target_={__name__}.Onlooker"]
    run = tmp_path / "run"
    with pytest.raises(AssertionError):  # its exit code says that it was stopped
        train_here([*words, "trainer.stop_after=2"], run)
    seen = left_by(run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "time": 0.0, "attempt": 1, "Training/Loss": 1.0}\n')  # of a step that is made again
    train_here([*words, "resume=auto"], run)
    seen |= left_by(run) | Onlooker.seen
    table = (REPO / "README.md").read_text().partition("| in the run directory |")[2].partition("\n\n")[0]
    told = {name.rstrip("/") for cell in re.findall(r"^\| (`.*?) \|", table, flags=re.M) for name in
            re.findall(r"`([^`]+)`", cell)}  # fmt: skip
    assert told - ELSEWHERE == seen
    inside = {path.name for path in (run / "checkpoints/last").iterdir()}
    assert all(f"`{name}" in table for name in inside) and len(inside) == 4
