"""The files by which Kubernetes and SkyPilot start the launchers.

Their structure is held against the parts of the published schemas that they use, and their commands are run in plain
processes, with the environment that the cluster gives to each node and a torchrun that records how it was called.
"""

from __future__ import annotations

import copy
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import on_path
from tests.droid_datasets import write_droid
from tests.launchers.test_launcher import FAKE_TORCHRUN, REPO

LAUNCHERS = REPO / "launchers"
CONTAINER = {
    "name": str,
    "image": str,
    "command": [str],
    "args": [str],
    "env": [{"name": str, "value": str, "valueFrom": {"fieldRef": {"fieldPath": str}}}],
    "resources": {"limits": dict},
    "volumeMounts": [{"name": str, "mountPath": str, "readOnly": bool}],
}
CLAIM = {"claimName": str, "readOnly": bool}
POD = {
    "spec": {
        "restartPolicy": str,
        "terminationGracePeriodSeconds": int,
        "securityContext": {"runAsNonRoot": bool, "runAsUser": int, "fsGroup": int},
        "containers": [CONTAINER],
        "volumes": [
            {"name": str, "persistentVolumeClaim": CLAIM, "emptyDir": {"medium": str, "sizeLimit": str}},
        ],
    }
}
"""core/v1 PodTemplateSpec, https://kubernetes.io/docs/reference/kubernetes-api/workload-resources/pod-v1/."""

JOB = {
    "parallelism": int,
    "completions": int,
    "completionMode": str,
    "backoffLimit": int,
    "podFailurePolicy": {
        "rules": [{"action": str, "onExitCodes": {"containerName": str, "operator": str, "values": [int]}}]
    },
    "template": POD,
}
"""batch/v1 JobSpec, https://kubernetes.io/docs/reference/kubernetes-api/workload-resources/job-v1/."""

HEAD = {"apiVersion": str, "kind": str, "metadata": {"name": str}}
JOBSET = HEAD | {
    "spec": {
        "network": {"enableDNSHostnames": bool, "publishNotReadyAddresses": bool},
        "failurePolicy": {
            "maxRestarts": int,
            "rules": [{"name": str, "action": str, "onJobFailureReasons": [str]}],
        },
        "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": JOB}}],
    }
}
"""jobset.x-k8s.io/v1alpha2, config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml of kubernetes-sigs/jobset."""

REPLICA = {"replicas": int, "restartPolicy": str, "template": POD}
PYTORCHJOB = HEAD | {
    "spec": {
        "runPolicy": {"backoffLimit": int, "cleanPodPolicy": str},
        "pytorchReplicaSpecs": {"Master": REPLICA, "Worker": REPLICA},
    }
}
"""kubeflow.org/v1, manifests/base/crds/kubeflow.org_pytorchjobs.yaml of kubeflow/training-operator 1.9."""

SKYPILOT = {
    "name": str,
    "num_nodes": int,
    "resources": {"accelerators": str, "disk_size": int},
    "workdir": str,
    "volumes": dict,
    "envs": dict,
    "setup": str,
    "run": str,
}
"""https://docs.skypilot.co/en/stable/reference/yaml-spec.html; sky/utils/schemas.py of skypilot 0.14."""

SCHEMAS = {
    "kubernetes/jobset.yaml": JOBSET,
    "kubernetes/pytorchjob.yaml": PYTORCHJOB,
    "skypilot/train.yaml": SKYPILOT,
}


def misfits(value: Any, schema: Any, path: str = "") -> list[str]:
    """Keys that the schema doesn't know and values of another type."""
    if isinstance(schema, type):
        return [] if type(value) is schema else [f"{path}: {value!r} is no {schema.__name__}"]
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [f"{path}: no list"]
        return [wrong for n, item in enumerate(value) for wrong in misfits(item, schema[0], f"{path}[{n}]")]
    if not isinstance(value, dict):
        return [f"{path}: no mapping"]
    unknown = [f"{path}.{key}: unknown" for key in value if key not in schema]
    return unknown + [w for k, v in value.items() if k in schema for w in misfits(v, schema[k], f"{path}.{k}")]


@pytest.mark.parametrize("file", SCHEMAS)
def test_a_manifest_fits_its_schema_and_a_damaged_one_does_not(file):
    tree = yaml.safe_load((LAUNCHERS / file).read_text())
    assert misfits(tree, SCHEMAS[file]) == []
    damaged = copy.deepcopy(tree)
    damaged["spce"] = damaged.pop("spec" if "spec" in damaged else "run")
    assert misfits(damaged, SCHEMAS[file]) == [".spce: unknown"]


def pod(tree: dict[str, Any], kind: str) -> dict[str, Any]:
    """The specification of a pod of a PyTorchJob's replica `kind`, or of the JobSet."""
    spec = tree["spec"]
    inner = spec["pytorchReplicaSpecs"][kind] if kind else spec["replicatedJobs"][0]["template"]["spec"]
    return inner["template"]["spec"]


@pytest.mark.parametrize(("file", "kind"), [("jobset", ""), ("pytorchjob", "Master"), ("pytorchjob", "Worker")])
def test_pods_agree_with_themselves_and_with_the_image(file, kind):
    tree = yaml.safe_load((LAUNCHERS / "kubernetes" / f"{file}.yaml").read_text())
    spec = pod(tree, kind)
    (container,) = spec["containers"]
    env = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in spec["volumes"]}
    assert env["NPROC_PER_NODE"] == str(container["resources"]["limits"]["nvidia.com/gpu"])
    assert f"USER {spec['securityContext']['runAsUser']}" in (REPO / "Dockerfile").read_text()
    if kind:
        assert container["name"] == "pytorch"  # the container into which the operator puts its variables
        replicas = tree["spec"]["pytorchReplicaSpecs"]
        assert env["NNODES"] == str(sum(replica["replicas"] for replica in replicas.values()))
    else:
        job = tree["spec"]["replicatedJobs"][0]["template"]["spec"]
        assert env["NNODES"] == str(job["parallelism"]) == str(job["completions"])
        name, group = tree["metadata"]["name"], tree["spec"]["replicatedJobs"][0]["name"]
        assert env["MASTER_ADDR"] == f"{name}-{group}-0-0.{name}"


@pytest.fixture(scope="module")
def droid(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data") / "droid_1.0.1"
    write_droid(root)
    return root


def on_a_node(folder: Path, words: list[str], variables: dict[str, str]) -> list[str]:
    """What torchrun is started with where `words` run on a node whose /data and /runs lie below `folder`."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    # tini runs what follows `--`; SkyPilot's setup has made an environment, which the run activates.
    stand_ins = {"torchrun": FAKE_TORCHRUN, "tini": '#!/usr/bin/env bash\nshift\nexec "$@"\n'}
    for name, text in stand_ins.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (folder / ".venv" / "bin").mkdir(parents=True, exist_ok=True)
    (folder / ".venv" / "bin" / "activate").touch()
    if not (folder / "launchers").exists():
        (folder / "launchers").symlink_to(LAUNCHERS)
    path = f"{programs}:{on_path.folder()}:{Path(sys.executable).parent}:/usr/bin:/bin"
    env = {
        "PATH": path,
        "PYTHONPATH": str(REPO),
        "RECORD": str(folder / "record"),
        "HOME": str(folder),
        "CHECK_CONFIG": "0",
        **variables,
    }
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return (folder / "record").read_bytes().decode().split("\0")[:-1]


def environment_of(container: dict[str, Any], folder: Path, droid: Path, **cluster: str) -> dict[str, str]:
    """A container's own variables with places of this machine, and those that the cluster gives it."""
    own = {entry["name"]: entry.get("value", "") for entry in container["env"]}
    own["DATASET_PATH"] = own["DATASET_PATH"].replace("/data/droid_1.0.1", str(droid))
    return own | {k: own[k].replace("/runs", f"{folder}/runs") for k in ("RUN_DIR", "LOG_DIR")} | cluster


TORCHRUN = ["--nproc-per-node", "8", "--nnodes", "2", "--node-rank"]


@pytest.mark.slow
@pytest.mark.parametrize("node", [0, 1])
def test_a_jobset_pod_starts_its_node(node, tmp_path, droid):
    (container,) = pod(yaml.safe_load((LAUNCHERS / "kubernetes/jobset.yaml").read_text()), "")["containers"]
    # Configuration and data are checked before: by node 0 here, for all of these tests.
    variables = environment_of(container, tmp_path, droid, NODE_RANK=str(node), CHECK_CONFIG=str(1 - node))
    words = on_a_node(tmp_path, container["command"] + container["args"], variables)
    assert words[:8] == [*TORCHRUN, str(node), "--master-addr", "opentau-train-node-0-0.opentau-train"]
    assert words[8:] == [
        "-m",
        "opentau_train",
        "+recipe=droid_policy",
        f"paths.run_dir={tmp_path}/runs/opentau-train",
        "resume=auto",
    ]


@pytest.mark.parametrize(("kind", "node"), [("Master", 0), ("Worker", 1)])
def test_a_pytorchjob_pod_starts_its_node(kind, node, tmp_path, droid):
    """RANK and WORLD_SIZE count pods: pkg/controller.v1/pytorch/envvar.go of kubeflow/training-operator."""
    (container,) = pod(yaml.safe_load((LAUNCHERS / "kubernetes/pytorchjob.yaml").read_text()), kind)["containers"]
    operator = {"MASTER_ADDR": "opentau-train-master-0", "MASTER_PORT": "23456", "RANK": str(node), "WORLD_SIZE": "2"}
    words = on_a_node(
        tmp_path, container["command"] + container["args"], environment_of(container, tmp_path, droid, **operator)
    )
    assert words[:8] == [*TORCHRUN, str(node), "--master-addr", "opentau-train-master-0"]
    assert words[8:10] == ["--master-port", "23456"] and words[-1] == "resume=auto"


@pytest.mark.parametrize("node", [0, 1])
def test_a_skypilot_machine_starts_its_node(node, tmp_path, droid):
    """https://docs.skypilot.co/en/stable/running-jobs/environment-variables.html."""
    task = yaml.safe_load((LAUNCHERS / "skypilot/train.yaml").read_text())
    sky = {
        "SKYPILOT_NODE_RANK": str(node),
        "SKYPILOT_NUM_NODES": str(task["num_nodes"]),
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NUM_GPUS_PER_NODE": task["resources"]["accelerators"].partition(":")[2],
    }
    places = {k: v.replace("/runs", f"{tmp_path}/runs") for k, v in task["envs"].items()}
    given = places | {"DATASET_PATH": str(droid), "OVERRIDES": "trainer.steps=7 'name=my run'"}
    words = on_a_node(tmp_path, ["bash", "-c", task["run"]], given | sky)
    assert words[:8] == [*TORCHRUN, str(node), "--master-addr", "10.0.0.1"]
    assert words[-3:] == ["trainer.steps=7", "name=my run", "resume=auto"]


@pytest.mark.slow
@pytest.mark.distributed
def test_two_pods_of_the_jobset_train_together(tmp_path, droid):
    """Its command as two processes with the real torchrun, one rank each: the run saves and has its numbers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    (container,) = pod(yaml.safe_load((LAUNCHERS / "kubernetes/jobset.yaml").read_text()), "")["containers"]
    (tmp_path / "launchers").symlink_to(LAUNCHERS)
    here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NPROC_PER_NODE": "1", "OMP_NUM_THREADS": "1"}
    here |= {"EXTRA_TAIL_OVERRIDES": "+debug=smoke model=flow_tiny", "PYTHONPATH": str(REPO)}
    here |= {"PATH": f"{on_path.folder()}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    nodes = []
    for node in range(2):
        env = os.environ | environment_of(container, tmp_path, droid, NODE_RANK=str(node), **here)
        words = container["command"][2:] + container["args"]
        with open(tmp_path / f"{node}.txt", "w") as log:
            nodes.append(subprocess.Popen(words, cwd=tmp_path, env=env, stdout=log, stderr=log))
    codes = [node.wait(timeout=280) for node in nodes]
    assert codes == [0, 0], [(tmp_path / f"{node}.txt").read_text()[-3000:] for node in range(2)]
    run = tmp_path / "runs" / "opentau-train"
    assert (run / "checkpoints" / "last").exists() and (run / "logs" / "train_droid_policy.node1.log").exists()
    assert len((run / "metrics.jsonl").read_text().splitlines()) >= 2
