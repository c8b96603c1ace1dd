"""The image and uv.lock: pinned, public, without root, and in step with the project's other files."""

from __future__ import annotations

import json
import re
import tomllib
from typing import Any
from urllib.parse import urlparse

from tests.program import REPO


def instructions() -> list[tuple[str, str]]:
    """(instruction, the rest) of the Dockerfile, continued lines joined."""
    lines = [line for line in (REPO / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def test_the_image_is_pinned_has_no_root_and_what_it_copies_is_sent_to_the_builder():
    steps = instructions()
    known = {"FROM", "COPY", "RUN", "USER", "WORKDIR", "ENV", "ARG", "ENTRYPOINT", "CMD"}
    assert {step for step, _ in steps} <= known and steps[0][0] == "FROM"
    images = [rest for step, rest in steps if step == "FROM"]
    images += [m.group(1) for _, rest in steps if (m := re.match(r"--from=(\S+)", rest))]
    assert len(images) == 2 and all(re.search(r":[0-9]+\.[0-9]+", image) for image in images)
    users = [rest for step, rest in steps if step == "USER"]
    assert users and all(re.fullmatch("[1-9][0-9]*", user) for user in users)  # Kubernetes can check a number only
    sent = {line[1:] for line in (REPO / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [word for step, rest in steps if step == "COPY" and "--from" not in rest for word in rest.split()[1:-1]]
    assert set(copied) == sent and all((REPO / name).exists() for name in copied)
    runs = [rest for step, rest in steps if step == "RUN"]
    assert [run for run in runs if "uv sync" in run] and all("--frozen" in run for run in runs if "uv sync" in run)
    for run in (run for run in runs if "apt-get install" in run):
        assert "--no-install-recommends" in run and "rm -rf /var/lib/apt/lists" in run
    for step, rest in steps:
        if step in ("ENTRYPOINT", "CMD"):
            assert json.loads(rest), "the exec form: a shell in between hands no signals on"


def test_the_extras_of_the_image_exist():
    (extras,) = [rest for step, rest in instructions() if step == "ARG"]
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    names = re.findall(r"--extra (\w+)", extras)
    assert names and set(names) <= set(project["optional-dependencies"])


def locked() -> list[dict[str, Any]]:
    return tomllib.loads((REPO / "uv.lock").read_text())["package"]


def test_the_lock_names_public_places_only():
    urls = [urlparse(url) for url in re.findall(r'"(https?://[^"]+|file:[^"]+)"', (REPO / "uv.lock").read_text())]
    assert len(urls) > 1000
    assert {url.hostname for url in urls} <= {"pypi.org", "files.pythonhosted.org"}


def test_the_lock_has_the_versions_of_the_constraints_and_the_extras_of_the_project():
    pins = [line.split("==") for line in (REPO / "constraints.txt").read_text().splitlines() if "==" in line]
    pinned = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins}
    packages = {package["name"]: package for package in locked()}
    shared = {name: package["version"] for name, package in packages.items() if name in pinned}
    assert len(shared) > 100 and shared == {name: pinned[name] for name in shared}
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    own = packages["opentau-train"]
    assert set(own["metadata"]["provides-extras"]) == set(project["optional-dependencies"])
    required = {re.split(r"[<>=\[ ]", text)[0].lower() for text in project["dependencies"]}
    assert required <= {re.sub("_", "-", d["name"]) for d in own["dependencies"]} | {"huggingface_hub"}


def test_the_locks_torch_is_the_one_with_cuda_on_linux():
    (torch,) = [package for package in locked() if package["name"] == "torch"]
    of_linux = [d["name"] for d in torch["dependencies"] if "linux" in d.get("marker", "")]
    assert any(name.startswith("nvidia-") for name in of_linux) and "triton" in of_linux
