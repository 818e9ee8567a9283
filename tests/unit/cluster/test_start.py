"""Joining a Ray that is not there, or that lets nobody in: one line, and quickly."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import ray
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from cluster.errors import ClusterError
from cluster.runtime import start
from cluster.runtime.start import check_address
from tests.conftest import message


class Gcs(gcs_service_pb2_grpc.NodeInfoGcsServiceServicer):
    """Answers as a Ray would."""

    token, version = "", ray.__version__

    def CheckAlive(self, request: Any, context: Any) -> Any:
        sent = dict(context.invocation_metadata()).get("authorization", "")
        if self.token and sent != self.token:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
        return gcs_service_pb2.CheckAliveReply(ray_version=self.version)


@pytest.fixture
def gcs() -> Iterator[tuple[Gcs, str]]:
    server, service = grpc.server(ThreadPoolExecutor(1)), Gcs()
    gcs_service_pb2_grpc.add_NodeInfoGcsServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield service, f"127.0.0.1:{port}"
    server.stop(0).wait()


@pytest.fixture(autouse=True)
def _no_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_USE_TLS"):
        monkeypatch.delenv(name, raising=False)


def test_a_ray_that_lives_is_let_be(gcs: tuple[Gcs, str]) -> None:
    check_address(gcs[1])


def test_one_that_is_gone_is_named_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    begun_s = time.monotonic()
    with pytest.raises(ClusterError) as error:
        check_address(address, wait_s=0.0)
    assert time.monotonic() - begun_s < 10
    assert message(error) == (
        f"RAY_ADDRESS={address}: no Ray answers there; correct it, start that Ray, or unset "
        "RAY_ADDRESS to run on this machine alone"
    )


def test_one_that_is_being_started_is_waited_for(gcs, monkeypatch) -> None:
    ask, answers = start._error, [grpc.StatusCode.UNAVAILABLE]

    class Refused(grpc.RpcError):
        def code(self) -> Any:
            return answers.pop()

    monkeypatch.setattr(start, "_error", lambda address: Refused() if answers else ask(address))
    check_address(gcs[1])
    assert not answers


def test_one_that_asks_for_a_token_is_answered_with_how(gcs, monkeypatch) -> None:
    service, address = gcs
    service.token = "Bearer of-another"
    with pytest.raises(ClusterError) as error:
        check_address(address)
    assert "asks for a token; set RAY_AUTH_MODE=token" in message(error)
    assert "of-another" not in message(error)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setattr(start, "_token", lambda: [("authorization", "Bearer of-mine")])
    with pytest.raises(ClusterError) as error:
        check_address(address)
    assert "another token than the one that is here" in message(error)
    service.token = "Bearer of-mine"
    check_address(address)


def test_one_of_another_version_is_refused(gcs: tuple[Gcs, str]) -> None:
    gcs[0].version = "2.1.0"
    with pytest.raises(ClusterError) as error:
        check_address(gcs[1])
    assert f"is Ray 2.1.0, this one is {ray.__version__}" in message(error)


def test_what_answers_without_being_a_ray_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    address = "127.0.0.1:{}".format(server.add_insecure_port("127.0.0.1:0"))
    server.start()
    with pytest.raises(ClusterError, match="is no Ray"):
        check_address(address)
    server.stop(0).wait()


@pytest.mark.parametrize("address", ["auto", "local", "ray://host:10001"])
def test_other_forms_are_left_to_ray(address: str) -> None:
    check_address(address, wait_s=0.0)


def test_workers_of_a_ray_that_is_joined_get_what_was_set_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That Ray was started by somebody else: nothing of this process's environment is there."""
    asked: dict[str, Any] = {}
    monkeypatch.setattr(ray, "init", lambda **options: asked.update(options))
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "12345")
    monkeypatch.delenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", raising=False)
    spec: Any = SimpleNamespace(num_workers=2, cpus_per_worker=1.0)
    start.start_ray(spec, "run", tmp_path, "10.0.0.1:6379")
    assert asked["runtime_env"]["env_vars"] == {
        "MALLOC_MMAP_THRESHOLD_": "12345", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
    }  # fmt: skip
