"""The C++ of `source`, compiled at first use, kept in a folder of the user's, and loaded by ctypes.

A plain C interface needs none of torch's headers: it compiles in seconds and fits every version.
The library's file is named by what decides its bytes (sources, compiler, flags), so that an old one
is never taken for a new one. It is written under a name of its own and then renamed: processes that
compile at the same time do not see each other's halves.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path

from sparsify.errors import TwofourError, first_line

PATHS = ("plain", "avx2", "avx512")
"""Instruction sets, by the numbers that source/linear.cpp gives them"""

_SOURCE = Path(__file__).with_name("source")

_COMPILERS = ("c++", "g++", "clang++")

_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-w")

_UNITS = {
    "linear.cpp": (),
    "path_plain.cpp": ("-O2",),
    "path_avx2.cpp": ("-mavx2", "-mfma", "-mf16c"),
    "path_avx512.cpp": (
        "-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl",
    ),
}  # fmt: skip
"""Source file -> flags of its own"""

_TIMEOUT_S = 600.0  # of a compiler; measured 10 s of work, on a machine that does much else more


class LibraryError(TwofourError):
    """The library cannot be compiled or loaded; one line that says why and what to do."""


class Job(ctypes.Structure):
    """`Linear` of source/job.h, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in
          ("x", "y", "blocks", "scales", "zeros", "bias", "scratch")),
        *((name, ctypes.c_int64) for name in
          ("num_tokens", "num_rows", "num_columns", "x_stride", "num_chunks", "num_groups",
           "group_steps")),
        *((name, ctypes.c_int32) for name in ("type", "is_bfloat16", "num_threads", "path")),
    ]  # fmt: skip


class DenseJob(ctypes.Structure):
    """`Dense` of source/job.h, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "y", "weight", "bias", "scratch")),
        *((name, ctypes.c_int64) for name in ("num_tokens", "num_rows", "num_columns", "x_stride")),
        *((name, ctypes.c_int32) for name in ("num_threads", "path")),
    ]


@dataclass(frozen=True)
class Library:
    """The loaded library."""

    file: Path
    handle: ctypes.CDLL
    best: int
    """index in `PATHS` of the best that this processor has"""
    has_threads: bool
    """whether it was built with OpenMP"""

    @property
    def paths(self) -> tuple[str, ...]:
        """What this processor can run, the best last."""
        return PATHS[: self.best + 1]


def cache_folder() -> Path:
    """Where compiled libraries are kept unless `use_folder` names another place."""
    try:
        return Path.home() / ".cache" / "twofour" / "kernels"
    except RuntimeError:
        raise LibraryError("this user has no home folder; name one with use_folder") from None


class _Loader:
    """One library a process, made by whoever asks first."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.folder: Path | None = None
        self.compiler: str | None = None
        self.loaded: Library | None = None
        self.failure: str | None = None


_LOADER = _Loader()


def use_folder(folder: Path | None, compiler: str | None = None) -> None:
    """Keep libraries in `folder` and compile with `compiler`; None for the defaults.

    Takes effect at the next use: what was loaded is forgotten, and so is a failure.
    """
    with _LOADER.lock:
        _LOADER.folder, _LOADER.compiler = folder, compiler
        _LOADER.loaded = _LOADER.failure = None


def library() -> Library | None:
    """The library, compiled if it has to be; None where it cannot be had, said once as a warning.

    Cost: at the first use ever some 10 s of compiling, shared by the processors; at the first use
    of a process some 20 ms; then nothing.
    """
    if _LOADER.loaded is not None or _LOADER.failure is not None:
        return _LOADER.loaded
    with _LOADER.lock:
        if _LOADER.loaded is None and _LOADER.failure is None:
            try:
                _LOADER.loaded = load(_LOADER.folder or cache_folder(), _LOADER.compiler)
                if not _LOADER.loaded.has_threads:
                    _warn("the C++ compiler has no OpenMP: packed layers run on one thread")
            except LibraryError as error:
                _LOADER.failure = str(error)
                _warn(f"{error}; until then layers run in PyTorch, packed ones much slower")
    return _LOADER.loaded


def _warn(text: str) -> None:
    warnings.warn(f"CPU kernels: {text}", RuntimeWarning, stacklevel=4)


def load(folder: Path, compiler: str | None = None) -> Library:
    """Load the library from `folder`, where it is compiled first if it is not there.

    Raises:
        LibraryError: no compiler or one that fails, a folder that cannot be written, or one that
            others can write: what lies there could be anybody's code.
    """
    compiler = compiler or next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise LibraryError(f"no C++ compiler ({', '.join(_COMPILERS)}) is on the PATH; install one")
    units = dict(_UNITS) if platform.machine() in ("x86_64", "AMD64") else {
        name: flags for name, flags in _UNITS.items() if "avx" not in name
    }  # fmt: skip
    file = folder / f"linear-{_key(compiler, units)}.so"
    _require_private(folder)
    if not file.exists():
        _compile(compiler, units, folder, file)
    about = file.lstat()
    if not stat.S_ISREG(about.st_mode) or not _is_private(about):
        raise LibraryError(f"{file} is not this user's alone; delete it")
    try:
        handle = ctypes.CDLL(str(file))
    except OSError as error:
        raise LibraryError(f"{file} cannot be loaded ({first_line(error)}); delete it") from None
    for function in (handle.twofour_linear, handle.twofour_dense):
        function.argtypes, function.restype = [ctypes.c_void_p], None
    handle.twofour_read.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int]
    handle.twofour_read.restype = ctypes.c_uint64
    return Library(file, handle, handle.twofour_best_path(), bool(handle.twofour_has_threads()))


def _key(compiler: str, units: dict[str, tuple[str, ...]]) -> str:
    """Digest of what decides the library's bytes."""
    digest = hashlib.sha256()
    version = _run([compiler, "--version"]).stdout
    parts = [platform.machine(), str(Path(compiler).resolve()), version, repr(_FLAGS), repr(units)]
    for path in sorted(_SOURCE.iterdir()):
        parts += [path.name, path.read_text(encoding="utf-8")]
    for part in parts:
        digest.update(f"{len(part)} {part}".encode())
    return digest.hexdigest()[:32]


def _require_private(folder: Path) -> None:
    """Make the folder, for this user alone, or hold the one that is there to that."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = folder.stat()
    except OSError as error:
        raise LibraryError(
            f"the folder {folder} cannot be made ({error.strerror}); name another with use_folder"
        ) from None
    if not _is_private(about):
        raise LibraryError(f"others can write to {folder}; make it yours: chmod 700 {folder}")


def _is_private(about: os.stat_result) -> bool:
    return about.st_uid == os.getuid() and not about.st_mode & 0o022


def _compile(compiler: str, units: dict[str, tuple[str, ...]], folder: Path, file: Path) -> None:
    try:
        place = Path(tempfile.mkdtemp(prefix=".build-", dir=folder))
    except OSError as error:
        raise LibraryError(
            f"the folder {folder} cannot be written ({error.strerror}); name another with "
            "use_folder"
        ) from None
    try:
        words = {
            name: [compiler, *_FLAGS, *flags, "-c", str(_SOURCE / name), "-o", f"{place}/{name}.o"]
            for name, flags in units.items()
        }
        threads = ["-fopenmp"]
        failed = _run([*words["linear.cpp"], *threads]).returncode
        if failed:
            threads = []
        else:
            del words["linear.cpp"]
        _run_all(list(words.values()))
        objects = [f"{place}/{name}.o" for name in units]
        _run_all([[compiler, "-shared", *objects, *threads, "-o", f"{place}/library.so"]])
        (place / "library.so").chmod(0o700)
        (place / "library.so").replace(file)
    except OSError as error:
        raise LibraryError(
            f"{compiler} cannot be run ({error.strerror}); install another"
        ) from None
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _run(words: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(  # words of ours, no shell in them  # noqa: S603
            words, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        raise LibraryError(f"{words[0]} took more than {_TIMEOUT_S:.0f} s; try again") from None
    except OSError as error:
        raise LibraryError(
            f"{words[0]} cannot be run ({error.strerror}); install a C++ compiler"
        ) from None


def _run_all(commands: list[list[str]]) -> None:
    """Run compilers side by side."""
    running = [
        subprocess.Popen(  # words of ours, no shell in them  # noqa: S603
            words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        for words in commands
    ]
    errors = []
    for child in running:
        try:
            _, text = child.communicate(timeout=_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            child.kill()
            _, text = child.communicate()
        if child.returncode:
            errors.append(next((line for line in text.splitlines() if "error" in line), text))
    if errors:
        said = " ".join(errors[0].split()) or "it was killed"
        raise LibraryError(f"{commands[0][0]} failed ({said}); install another C++ compiler")
