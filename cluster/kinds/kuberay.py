"""Kubernetes with the KubeRay operator: a RayJob, which brings up a Ray of its own for the command.

The manifest is made here and handed to `kubectl`. The project is in the image (cluster/images),
the job's options are in a ConfigMap, and model, text and run.dir on a claim that every pod mounts.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shlex
import subprocess
from collections.abc import Iterator
from typing import Any

import yaml

from cluster.errors import ClusterError
from cluster.kinds._base import DONE, FAILED, RUNNING, STOPPED, WAITING, Job, Kind, Status, call
from cluster.spec import ClusterSpec, KubeRaySpec

MANIFEST = "rayjob.yaml"

PROJECT, SUBMITTED = "/twofour", "/submitted"

_STATES = {
    "": WAITING, "PENDING": WAITING, "SCHEDULED": WAITING, "RUNNING": RUNNING,
    "SUCCEEDED": DONE, "STOPPED": STOPPED,
}  # fmt: skip
"""RayJob's status.jobStatus -> ours; every other is a failure"""

_STOP_WAIT_S = 600


class KubeRay(Kind):
    """RayJobs of a Kubernetes cluster, through kubectl and its current context."""

    name = "kuberay"

    def files(self, spec: ClusterSpec, job: Job) -> dict[str, str]:
        """The RayJob; its ConfigMap is made from the options when it is applied."""
        try:
            manifest = _ray_job(spec, job)
        except ValueError as error:
            raise ClusterError(str(error)) from None
        return {MANIFEST: yaml.safe_dump(manifest, sort_keys=False, width=100)}

    def submit(self, job: Job) -> str:
        """`kubectl apply`; NAMESPACE/NAME."""
        doing = f"cannot submit {job.name}"
        manifest = yaml.safe_load((job.folder / MANIFEST).read_text(encoding="utf-8"))
        namespace, name = manifest["metadata"]["namespace"], manifest["metadata"]["name"]
        try:
            call(["kubectl", "config", "current-context"], doing)
        except ClusterError as error:
            raise ClusterError(
                f"{error}; cluster.kind=kuberay submits with kubectl to its current context: "
                "choose one with kubectl config use-context"
            ) from None
        at = ["-n", namespace]
        # One that has ended is not started again by applying the same.
        call(["kubectl", "delete", "rayjob", name, *at, "--ignore-not-found"], doing)
        options = {
            "apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {"name": name, "namespace": namespace},
            "data": {path.name: path.read_text("utf-8") for path in job.folder.glob("config.yaml")},
        }  # fmt: skip
        call(["kubectl", "apply", "-f", "-"], doing, stdin=yaml.safe_dump(options))
        call(["kubectl", "apply", "-f", str(job.folder / MANIFEST)], doing)
        return f"{namespace}/{name}"

    def status(self, job: Job) -> Status:
        """What the RayJob's status says."""
        found = _status_of(job)
        if found is None:
            return Status(STOPPED, "Kubernetes has no such RayJob any more")
        word = str(found.get("jobStatus", ""))
        deployed = str(found.get("jobDeploymentStatus", ""))
        state = FAILED if deployed == "Failed" and word in ("", "PENDING", "RUNNING") else None
        state = state or _STATES.get(word, FAILED)
        said = " ".join(str(found.get("message", "")).split())[:200]
        code = re.search(r"exit code (\d+)", said)
        number = int(code[1]) if code else (0 if state == DONE else None)
        if state == FAILED and number == 75:
            state = STOPPED
        detail = ", ".join(filter(None, [deployed.lower(), word.lower(), said]))
        return Status(state, detail, number)

    def logs(self, job: Job, follow: bool = False) -> Iterator[str]:
        """What the pod that follows the job has printed."""
        namespace, name = job.id.split("/")
        words = ["kubectl", "logs", "-n", namespace, "-l", f"job-name={name}", "--tail=-1"]
        if not follow:
            yield from call(words, f"cannot read the log of {job.id}").splitlines()
            return
        process = subprocess.Popen(  # words of ours, no shell in them  # noqa: S603
            [*words, "--follow"], stdout=subprocess.PIPE, text=True
        )
        try:
            for line in process.stdout or ():
                yield line.rstrip("\n")
        finally:
            process.terminate()
            process.wait()

    def cancel(self, job: Job, now: bool = False) -> str:
        """Have the Ray job save and stop, or delete the RayJob and its Ray `now`."""
        namespace, name = job.id.split("/")
        doing, at = f"cannot cancel {job.id}", ["-n", namespace]
        found = _status_of(job) or {}
        if now or not (found.get("jobId") and found.get("rayClusterName")):
            call(["kubectl", "delete", "rayjob", name, *at, "--ignore-not-found"], doing)
            return f"{job.id} is deleted"
        labels = f"ray.io/cluster={found['rayClusterName']},ray.io/node-type=head"
        head = call(["kubectl", "get", "pod", *at, "-l", labels, "-o", "name"], doing)
        if not head:
            raise ClusterError(f"{doing}: its Ray has no head; --now deletes it")
        stop = ["ray", "job", "stop", "--no-wait", str(found["jobId"])]
        call(["kubectl", "exec", *at, head.splitlines()[0], "--", *stop], doing)
        return f"{job.id} was asked to save and stop; --now ends it without"

    def hints(self, job: Job) -> list[str]:
        """Commands of kubectl's."""
        namespace, name = job.id.split("/")
        return [
            f"follow:    kubectl logs -n {namespace} -l job-name={name} --follow",
            f"dashboard: kubectl port-forward -n {namespace} $(kubectl get rayjob -n {namespace} "
            f"{name} -o jsonpath='svc/{{.status.rayClusterName}}-head-svc') 8265:8265, then "
            "http://localhost:8265",
        ]


def _status_of(job: Job) -> dict[str, Any] | None:
    namespace, name = job.id.split("/")
    words = ["kubectl", "get", "rayjob", name, "-n", namespace, "--ignore-not-found", "-o", "json"]
    said = call(words, f"cannot ask for {job.id}")
    return dict(json.loads(said).get("status", {})) if said else None


def _ray_job(spec: ClusterSpec, job: Job) -> dict[str, Any]:
    """The manifest, by the fields of ray.io/v1."""
    kube = spec.kuberay
    if not kube.image:
        raise ValueError(
            "cluster.kuberay.image: is needed with cluster.kind=kuberay; build one of "
            "cluster/images/Dockerfile and name it"
        )
    workers = spec.workers_per_node
    words = [word.replace(str(job.folder), SUBMITTED) for word in job.command]
    command = f"cd {PROJECT} && {shlex.join(['python', *words])}"
    cpus = math.ceil(workers * spec.cpus_per_worker) or 1
    gpus = workers * int(spec.gpus_per_worker)
    name = _name(job)
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name, "namespace": kube.namespace},
        "spec": {
            "entrypoint": command,
            "metadata": {"name": re.sub(r"[^\w.-]", "-", job.name, flags=re.ASCII)},
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "rayClusterSpec": {
                "authOptions": {"mode": "token"},
                "headGroupSpec": {
                    # The driver alone is there; workers go to the machines they were asked for.
                    "rayStartParams": {"num-cpus": "0"},
                    "template": _pod("ray-head", kube, name, {"cpu": "4", "memory": "16Gi"}),
                },
                "workerGroupSpecs": [
                    {
                        "groupName": "workers",
                        "replicas": spec.num_nodes,
                        "minReplicas": spec.num_nodes,
                        "maxReplicas": spec.num_nodes,
                        "rayStartParams": {},
                        "template": _pod("ray-worker", kube, name, {
                            "cpu": str(cpus), "memory": kube.memory,
                            **({"nvidia.com/gpu": str(gpus)} if gpus else {}),
                        }),
                    }
                ],
            },
        },
    }  # fmt: skip


def _pod(container: str, kube: KubeRaySpec, name: str, resources: dict[str, str]) -> dict[str, Any]:
    """The template of a pod: the image, the claim, the options, memory shared by processes."""
    environment = {
        "PYTHONPATH": PROJECT, "TWOFOUR_SUBMITTED": "kuberay", "OMP_NUM_THREADS": "1",
        "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1", "RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_WAIT_S),
    }  # fmt: skip
    volumes: list[dict[str, Any]] = [
        {"name": "memory", "emptyDir": {"medium": "Memory"}},
        {"name": "options", "configMap": {"name": name}},
    ]
    mounts = [
        {"name": "memory", "mountPath": "/dev/shm"},  # noqa: S108  Ray's object store, NCCL
        {"name": "options", "mountPath": SUBMITTED},
    ]
    if kube.claim:
        volumes.append({"name": "shared", "persistentVolumeClaim": {"claimName": kube.claim}})
        mounts.append({"name": "shared", "mountPath": kube.mount})
    spec: dict[str, Any] = {
        "containers": [
            {
                "name": container,
                "image": kube.image,
                "env": [{"name": key, "value": value} for key, value in environment.items()],
                **({"envFrom": [{"secretRef": {"name": kube.secret}}]} if kube.secret else {}),
                "resources": {"requests": resources, "limits": resources},
                "volumeMounts": mounts,
            }
        ],
        "volumes": volumes,
    }
    if kube.node_selector:
        spec["nodeSelector"] = dict(label.split("=", 1) for label in kube.node_selector)
    return {"spec": spec}


def _name(job: Job) -> str:
    """A name for Kubernetes, the same for the same run: letters, digits and dashes, 40 at most."""
    slug = re.sub(r"[^a-z0-9]+", "-", job.name.lower()).strip("-")[:24].strip("-")
    digest = hashlib.sha256(job.run_dir.encode()).hexdigest()[:6]
    return f"tf-{slug}-{digest}" if slug else f"tf-{digest}"


KIND = KubeRay()
