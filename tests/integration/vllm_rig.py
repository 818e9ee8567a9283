"""vLLM for its tests: an environment of its own, with this project beside it, and servers.

vLLM brings a torch and a transformers of its own choice, so it cannot share .venv. `make vllm-env`
makes .venv-vllm once (3.4 GB), the versions of vllm-requirements.txt and no others; tests install
the project into it from a copy, as a user does, each time they are run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]

VENV = REPOSITORY / ".venv-vllm"

PYTHON = VENV / "bin" / "python"

REQUIREMENTS = Path(__file__).with_name("vllm-requirements.txt")

_STAMP = VENV / ".ready"

_START_S = 1200.0  # of a server, 16 s of work for each of its processes; 510 s where much else runs


def _stamp() -> str:
    """What the environment was made from."""
    version = ".".join(map(str, sys.version_info[:2]))
    return f"{version} {hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()}"


def why_not() -> str | None:
    """Why there is no environment to test in; None: there is."""
    if not _STAMP.is_file():
        return f"no {VENV.name}; 'make vllm-env' makes it (3.4 GB)"
    if _STAMP.read_text(encoding="utf-8") != _stamp():
        return f"{VENV.name} is of other versions; 'make vllm-env' makes it anew (3.4 GB)"
    return None


def make_environment() -> None:
    """Make .venv-vllm, unless it is there and of these versions."""
    if why_not() is None:
        return
    if not VENV.is_symlink():
        shutil.rmtree(VENV, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
    _pip("install", "--no-deps", "-r", REQUIREMENTS)
    _STAMP.write_text(_stamp(), encoding="utf-8")


def install_project(scratch: Path) -> tuple[list[str], list[str]]:
    """`pip install twofour` beside vLLM; the packages that were there before, and after.

    From a copy: a build leaves what it made in the folder, and takes it for the truth next time.
    """
    _pip("uninstall", "--yes", "twofour")
    before = _pip("freeze").splitlines()
    shutil.copytree(
        REPOSITORY / "sparsify", scratch / "sparsify", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, scratch)
    _pip("install", scratch)
    return before, _pip("freeze").splitlines()


def _pip(*words: str | Path) -> str:
    quiet = ["--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [PYTHON, "-m", "pip", *quiet, *words], capture_output=True, text=True, check=False,
        cwd=VENV,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def environment(folder: Path) -> dict[str, str]:
    """Of vLLM on a machine with other work: one thread, a small cache, nothing of the network."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    return {
        **kept, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1", "VLLM_CACHE_ROOT": str(folder / "cache"),
    }  # fmt: skip


class Server:
    """A vLLM server that answers."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process, self.port, self.log = process, port, log

    def complete(self, prompts: list[list[int]], num_tokens: int) -> list[dict[str, Any]]:
        """Greedy continuations of token ids, by the OpenAI API: each with `token_ids`."""
        return self._ask("/v1/completions", {
            "prompt": prompts, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True,
            "return_token_ids": True, "logprobs": 1,
        })["choices"]  # fmt: skip

    def _ask(self, path: str, body: dict[str, Any] | None) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            content = answer.read()
        return json.loads(content) if content else None

    def wait(self) -> None:
        """Until it is ready; its log's end where it stops before that, or takes too long."""
        deadline_s = time.monotonic() + _START_S
        while time.monotonic() < deadline_s:
            assert self.process.poll() is None, self.said()
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                self._ask("/health", None)
                return
            time.sleep(0.5)
        raise AssertionError(f"no server after {_START_S:.0f} s\n{self.said()}")

    def said(self) -> str:
        """Its log."""
        return self.log.read_text(encoding="utf-8", errors="replace")


@contextlib.contextmanager
def serving(model: Path, scratch: Path, *words: str) -> Iterator[Server]:
    """A server of a model folder, on this machine alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    scratch.mkdir(exist_ok=True)
    log = scratch / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--host",
             "127.0.0.1", "--port", str(port), "--max-model-len", "128", "--max-num-seqs", "4",
             *words],
            env=environment(scratch), cwd=scratch, stdout=out, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    server = Server(process, port, log)
    try:
        server.wait()
        yield server
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)


if __name__ == "__main__":
    make_environment()
