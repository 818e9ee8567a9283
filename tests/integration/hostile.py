"""What another user of a host tries against a job there; it prints what came of each attempt.

python hostile.py JOB_FOLDER SCRATCH GCS_ADDRESS DASHBOARD_PORT NUMBER_OF_ITS_USER
"""

from __future__ import annotations

import json
import os
import signal
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any


def attempt(call: Callable[[], Any]) -> str:
    """`done: ` and what the call returns, or the error that it ends with."""
    try:
        return f"done: {call()!r}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def ask(port: str, path: str, token: str | None, body: bytes | None = None) -> int:
    """HTTP status of a call to the dashboard."""
    headers = {"Content-Type": "application/json"}
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def processes_of(user: int) -> dict[str, list[str]]:
    """What is seen of a user's processes: command lines, and environments that could be read."""
    found: dict[str, list[str]] = {"words": [], "environ": [], "killed": []}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            if folder.stat().st_uid != user:
                continue
            words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        found["words"].append(words)
        for name, call in (
            ("environ", (folder / "environ").read_bytes),
            ("killed", lambda pid=int(folder.name): os.kill(pid, signal.SIGCONT)),
        ):
            if attempt(call).startswith("done"):
                found[name].append(words)
    return found


def main() -> None:
    """Try all of it."""
    folder, scratch, address, port, user = sys.argv[1:]
    from cluster.runtime.start import check_address

    found: dict[str, Any] = {}
    found["token file"] = attempt((Path(folder) / "token").read_text)
    found["options"] = attempt((Path(folder) / "config.yaml").read_text)
    found["scratch"] = attempt(lambda: os.listdir(scratch))
    found["write into scratch"] = attempt(lambda: (Path(scratch) / "x").write_text("x"))
    found["rename scratch"] = attempt(lambda: os.rename(scratch, f"{scratch}.mine"))
    shared = [path for path in Path("/dev/shm").iterdir() if path.stat().st_uid == int(user)]
    found["shared memory"] = [str(path) for path in shared if os.access(path, os.R_OK)]
    found["processes"] = processes_of(int(user))
    found["GCS without a token"] = attempt(lambda: check_address(address, 5))
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 2}
    found["GCS with another token"] = attempt(lambda: check_address(address, 5))
    job = json.dumps({"entrypoint": "touch /tmp/got-in"}).encode()
    for token in (None, "0123456789abcdef" * 2):
        whose = "no" if token is None else "another"
        for path in ("/api/jobs/", "/nodes?view=summary", "/api/v0/actors", "/api/cluster_status"):
            found[f"{path} with {whose} token"] = attempt(
                lambda path=path, token=token: ask(port, path, token)
            )
        found[f"a job with {whose} token"] = attempt(
            lambda token=token: ask(port, "/api/jobs/", token, job)
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
