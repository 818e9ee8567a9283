"""A virtual environment of its own for a tool that is compared with, made once and used again.

The tool keeps its own versions of packages, and this project's installation stays as it is.
"""

from __future__ import annotations

import json
import platform
import shutil
import sys
from importlib import metadata
from pathlib import Path

from jobs.benchmarks.support.processes import run_logged
from sparsify.errors import InputError

LLMCOMPRESSOR = "0.14.0.1"

_MARKER = "installed.json"


def llmcompressor_python(root: Path) -> Path:
    """The interpreter of an environment with llm-compressor, which is made if it is not there.

    Torch is held at the version of this project, so that both sides run the same kernels;
    everything else is what llm-compressor asks for. The folder appears whole or not at all.

    Args:
        root: where benchmarks keep their files; the environment is a folder in it.

    Raises:
        InputError: pip could not install it; the message names pip's log.

    Cost: about 1.5 GB on disk and some minutes, once.
    """
    folder = root / f"llmcompressor-{LLMCOMPRESSOR}"
    wanted = [f"llmcompressor=={LLMCOMPRESSOR}", f"torch=={_public(metadata.version('torch'))}"]
    python = folder / "bin" / "python"
    if _is_complete(folder, wanted):
        return python
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    root.mkdir(parents=True, exist_ok=True)
    log = root / f"{folder.name}.log"
    print(f"installing {', '.join(wanted)} into {folder} (once; log: {log})", flush=True)
    pip = [str(partial / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    freeze = partial / "packages.txt"
    for words, output in (
        ([sys.executable, "-m", "venv", str(partial)], log),
        ([*pip, "install", *wanted], log),
        ([*pip, "list", "--format=freeze"], freeze),
    ):
        if code := run_logged(words, output):
            raise InputError(
                f"{' '.join(words)}: exit code {code}, see {output}; it needs a package index "
                "that pip can reach"
            )
    lines = freeze.read_text(encoding="utf-8").splitlines()
    packages = dict(line.split("==") for line in lines if line.count("==") == 1)
    marker = {"wanted": wanted, "python": platform.python_version(), "packages": packages}
    (partial / _MARKER).write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")
    # A moved environment keeps working through bin/python; only its console scripts would not.
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return python


def installed_versions(python: Path, names: tuple[str, ...]) -> dict[str, str]:
    """Versions of `names` in the environment that `python` belongs to."""
    marker = json.loads((python.parent.parent / _MARKER).read_text(encoding="utf-8"))
    return {name: marker["packages"].get(name, "not installed") for name in names}


def _is_complete(folder: Path, wanted: list[str]) -> bool:
    """Whether the folder holds what is wanted, for this Python."""
    marker = folder / _MARKER
    if not marker.is_file():
        return False
    found = json.loads(marker.read_text(encoding="utf-8"))
    return found["wanted"] == wanted and found["python"] == platform.python_version()


def _public(version: str) -> str:
    """A version without its local part: 2.13.0 of 2.13.0+cpu."""
    return version.split("+")[0]
