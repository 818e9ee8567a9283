"""The RayJob: documented fields alone, whatever the options hold; kubectl's calls and answers."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path

import pytest
import yaml

from cluster import launch
from cluster.errors import ClusterError
from cluster.kinds import get_kind
from cluster.kinds._base import Job
from cluster.spec import ClusterSpec, KubeRaySpec

KUBE = KubeRaySpec(
    image="registry/twofour:1", claim="disk", secret="keys", node_selector=["gpu=h100"]
)
SPEC = ClusterSpec(
    num_nodes=4, num_workers=32, gpus_per_worker=1, cpus_per_worker=8, kind="kuberay", kuberay=KUBE
)

# Fields of ray.io/v1 and of Kubernetes' pods, by the references of KubeRay and Kubernetes.
ANY = None
TEMPLATE = {"spec": {"containers": ANY, "volumes": ANY, "nodeSelector": ANY}, "metadata": ANY}
FIELDS = {
    "apiVersion": ANY, "kind": ANY, "metadata": {"name": ANY, "namespace": ANY},
    "spec": {
        "entrypoint": ANY, "metadata": ANY, "runtimeEnvYAML": ANY, "submissionMode": ANY,
        "shutdownAfterJobFinishes": ANY, "ttlSecondsAfterFinished": ANY, "suspend": ANY,
        "backoffLimit": ANY, "activeDeadlineSeconds": ANY,
        "rayClusterSpec": {
            "authOptions": {"mode": ANY}, "rayVersion": ANY,
            "headGroupSpec": {"rayStartParams": ANY, "template": TEMPLATE},
            "workerGroupSpecs": [{
                "groupName": ANY, "replicas": ANY, "minReplicas": ANY, "maxReplicas": ANY,
                "rayStartParams": ANY, "template": TEMPLATE,
            }],
        },
    },
}  # fmt: skip


def job_in(run_dir: Path, **changes: str) -> Job:
    job = Job(
        kind="kuberay", name=run_dir.name,
        command=("-m", "jobs.prune", f"--config-dir={run_dir}/.cluster", "--config-name", "config"),
        typed="python -m jobs.prune", root="/project", directory="/", run_dir=str(run_dir),
    )  # fmt: skip
    return dataclasses.replace(job, **changes)


def manifest(job: Job, spec: ClusterSpec = SPEC) -> dict:
    return yaml.safe_load(get_kind("kuberay").files(spec, job)["rayjob.yaml"])


def hold_to(fields: object, node: object) -> None:
    if isinstance(fields, dict):
        assert set(node) <= set(fields), set(node) - set(fields)
        for key, value in node.items():
            hold_to(fields[key], value)
    elif isinstance(fields, list):
        for value in node:
            hold_to(fields[0], value)


def test_documented_fields_and_what_was_asked_for(tmp_path: Path) -> None:
    made = manifest(job_in(tmp_path / "My Run"))
    hold_to(FIELDS, made)
    assert (made["apiVersion"], made["kind"]) == ("ray.io/v1", "RayJob")
    assert made["metadata"]["name"].startswith("tf-my-run-")
    assert shlex.split(made["spec"]["entrypoint"]) == [
        "cd", "/twofour", "&&", "python", "-m", "jobs.prune", "--config-dir=/submitted",
        "--config-name", "config",
    ]  # fmt: skip
    cluster = made["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    (group,) = cluster["workerGroupSpecs"]
    assert group["replicas"] == 4
    pod = group["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {
        "cpu": "64", "memory": "64Gi", "nvidia.com/gpu": "8",
    }  # fmt: skip
    assert container["envFrom"] == [{"secretRef": {"name": "keys"}}]
    assert pod["nodeSelector"] == {"gpu": "h100"}
    assert {"name": "shared", "mountPath": "/shared"} in container["volumeMounts"]
    assert {volume["name"] for volume in pod["volumes"]} == {"memory", "options", "shared"}


@pytest.mark.parametrize("name", ["a: b", "x\n- y: z", "$(touch hit)", "'", "ü", "-", "A" * 90])
def test_names_stay_values(tmp_path: Path, name: str) -> None:
    made = manifest(job_in(tmp_path, name=name, typed=name))
    hold_to(FIELDS, made)
    assert len(made["metadata"]["name"]) <= 40
    assert made["metadata"]["name"].replace("-", "").isalnum()


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"cluster\.kuberay\.image: is needed"):
        manifest(job_in(tmp_path), dataclasses.replace(SPEC, kuberay=KubeRaySpec()))
    for changes in ({"image": "a b"}, {"namespace": "A"}, {"mount": "x"}, {"memory": "many"},
                    {"claim": "a\nb"}, {"node_selector": ["gpu"]}):  # fmt: skip
        with pytest.raises(ValueError, match=r"^cluster\.kuberay\.\w+"):
            KubeRaySpec(**changes)


KUBECTL = """#!/bin/sh
echo "$@" >>"{folder}/calls"
if [ "$1 $2" = "apply -f" ] && [ "$3" = - ]; then cat >"{folder}/stdin"; fi
if [ "$1 $2" = "config current-context" ]; then {context}; fi
if [ "$1 $2" = "get rayjob" ]; then cat "{folder}/status"; fi
if [ "$1 $2" = "get pod" ]; then echo pod/head; fi
exit 0
"""


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Put a kubectl on PATH that writes down how it is called; returns its calls."""

    def make(context: str = "echo here", **status: str) -> Path:
        (tmp_path / "status").write_text(json.dumps({"status": status}) if status else "")
        program = tmp_path / "bin" / "kubectl"
        program.parent.mkdir(exist_ok=True)
        program.write_text(KUBECTL.format(folder=tmp_path, context=context))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:/bin:/usr/bin")
        return tmp_path / "calls"

    return make


def test_applied_followed_and_cancelled(tmp_path: Path, kubectl) -> None:
    calls = kubectl(jobStatus="RUNNING", jobId="j1", rayClusterName="c1")
    run_dir = tmp_path / "run"
    job = launch.submit(SPEC, job_in(run_dir), {"config.yaml": "x: 1\n"})
    name = manifest(job)["metadata"]["name"]
    assert job.id == f"default/{name}"
    assert calls.read_text().splitlines()[1:] == [
        f"delete rayjob {name} -n default --ignore-not-found",
        "apply -f -",
        f"apply -f {run_dir}/.cluster/rayjob.yaml",
    ]
    options = yaml.safe_load((tmp_path / "stdin").read_text())
    assert options["kind"] == "ConfigMap"
    assert options["data"] == {"config.yaml": "x: 1\n"}
    kind = get_kind("kuberay")
    assert kind.status(job).state == "running"
    assert "asked to save" in kind.cancel(job)
    stop = "exec -n default pod/head -- ray job stop --no-wait j1"
    assert calls.read_text().splitlines()[-1] == stop
    assert "is deleted" in kind.cancel(job, now=True)


@pytest.mark.parametrize(
    ("status", "state"),
    [
        ({"jobDeploymentStatus": "Initializing"}, "waiting"),
        ({"jobStatus": "SUCCEEDED", "jobDeploymentStatus": "Complete"}, "done"),
        ({"jobStatus": "FAILED", "message": "command failed with exit code 75, see"}, "stopped"),
        ({"jobStatus": "FAILED", "message": "command failed with exit code 2, see"}, "failed"),
        ({"jobDeploymentStatus": "Failed", "jobStatus": "RUNNING"}, "failed"),
        ({}, "stopped"),
    ],
)
def test_states(tmp_path: Path, kubectl, status: dict, state: str) -> None:
    kubectl(**status)
    assert get_kind("kuberay").status(job_in(tmp_path, id="default/tf-x")).state == state


def test_no_context_is_one_line(tmp_path: Path, kubectl) -> None:
    kubectl(context="echo 'error: current-context is not set' >&2; exit 1")
    with pytest.raises(ClusterError) as error:
        launch.submit(SPEC, job_in(tmp_path / "run"), {"config.yaml": ""})
    assert str(error.value) == (
        "cannot submit run: kubectl: current-context is not set; cluster.kind=kuberay submits with "
        "kubectl to its current context: choose one with kubectl config use-context"
    )
