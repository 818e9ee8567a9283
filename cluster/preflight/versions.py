"""Whether all nodes have the same programs, and the same source of this project."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import cluster
from cluster.preflight.check import Check, Finding, Place, Report, odd_ones

PACKAGES = ("torch", "transformers", "ray", "deepspeed")

_ROOT = Path(cluster.__path__[0]).parent

_OWN = ("cluster", "conf", "jobs", "sparsify")


def look(place: Place, heard: list[Any]) -> dict[str, str]:
    """Name -> version on this node."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "missing"
    return {**found, "source": fingerprint(_ROOT)}


def fingerprint(root: Path) -> str:
    """Ten digits of a hash of all Python files of the project's packages below `root`."""
    digest = hashlib.sha256()
    for path in sorted(path for name in _OWN for path in (root / name).rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root)}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:10]


def judge(report: Report) -> Iterator[Finding]:
    """Nodes whose versions are not those of most."""
    facts = report.by_node("versions")
    for name in ("python", *PACKAGES, "source"):
        usual, others = odd_ones({node: fact[name] for node, fact in facts.items()})
        fix = "install the same on every node (make setup)"
        if name == "source":
            fix = "have the same files of this project on every node"
        for node in others:
            yield Finding(node, f"{name} {facts[node][name]}, the others have {usual}", fix)


CHECK = Check(
    "versions", (look,), judge,
    {"TORCH": lambda fact: fact["torch"], "SOURCE": lambda fact: fact["source"]},
)  # fmt: skip
