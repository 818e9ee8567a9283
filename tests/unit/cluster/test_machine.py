"""The way to a dashboard: its address, and the tunnel that somebody elsewhere needs."""

from __future__ import annotations

import pytest

from cluster.machine import way_to

LOGIN = "10.9.0.7 50514 10.9.0.1 22"


@pytest.fixture(autouse=True)
def at_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SSH_CONNECTION", "TWOFOUR_SUBMITTED"):
        monkeypatch.delenv(name, raising=False)


def test_at_the_machine_itself_the_address_does() -> None:
    assert way_to("http://127.0.0.1:8265") == "http://127.0.0.1:8265"
    assert way_to("http://10.0.0.1:8265/#/jobs/1", "10.0.0.1") == "http://10.0.0.1:8265/#/jobs/1"


def test_loopback_of_another_machine_is_reached_through_ssh_alone() -> None:
    assert way_to("http://127.0.0.1:8266", "10.0.0.1") == (
        "ssh -N -L 8266:localhost:8266 10.0.0.1, then http://localhost:8266"
    )


def test_somebody_who_came_by_ssh_gets_a_tunnel_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSH_CONNECTION", LOGIN)
    assert way_to("http://127.0.0.1:8265") == (
        "http://127.0.0.1:8265; from your own machine: "
        "ssh -N -L 8265:127.0.0.1:8265 10.9.0.1, then http://localhost:8265"
    )
    assert way_to("http://[fd00::1]:8265/#/jobs/a").endswith(
        "ssh -N -L '8265:[fd00::1]:8265' 10.9.0.1, then http://localhost:8265/#/jobs/a"
    )
    assert way_to("http://127.0.0.1:8265", "n0") == (
        "ssh -N -L 8265:localhost:8265 -J 10.9.0.1 n0, then http://localhost:8265"
    )


def test_a_submitted_job_knows_nothing_of_its_users_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm hands on the environment of the login node, where the job does not run."""
    monkeypatch.setenv("SSH_CONNECTION", LOGIN)
    monkeypatch.setenv("TWOFOUR_SUBMITTED", "slurm")
    assert way_to("http://127.0.0.1:8265") == "http://127.0.0.1:8265"


def test_what_the_environment_says_cannot_become_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSH_CONNECTION", "1 2 $(reboot) 22")
    assert " '$(reboot)', then" in way_to("http://127.0.0.1:8265")
