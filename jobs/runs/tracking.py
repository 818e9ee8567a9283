"""Where metrics go: a JSONL file in the run folder, always, and Weights & Biases when there is one.

The only importer of wandb. Tracking never stops, asks or delays a run: what goes wrong with
Weights & Biases is one warning, and the JSONL file has every metric regardless.
"""

from __future__ import annotations

import json
import math
import netrc
import os
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from conf.options.tracker import TrackerConfig
from jobs.runs.folder import cut_torn_line

METRICS_FILE = "metrics.jsonl"

_INIT_TIMEOUT_S = 10  # what an unreachable server costs at the start of a run

_FINISH_TIMEOUT_S = 60  # what it costs at the end; the rest stays on disk for `wandb sync`

_ENVIRONMENT_MODES = {"offline": "offline", "dryrun": "offline", "disabled": "off"}


class Tracker(Protocol):
    """A place for metrics."""

    def log(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Record named numbers (and short texts), at an optimizer step where there is one."""

    def close(self) -> None:
        """Write out what is left; nothing may be logged afterwards."""


class JsonlTracker:
    """One JSON object per line: `time_s` (Unix time), `step` if given, and the metrics.

    A line is on disk when `log` returns. Opening an existing file appends to it, after cutting a
    last line that a killed process left unfinished; a resumed run repeats the steps since its
    checkpoint, so the last line of a step is the one that counts.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        cut_torn_line(path)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def log(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Append one line; NaN and infinity become the texts 'nan' and 'inf', as JSON has none."""
        record = {"time_s": time.time()} | ({} if step is None else {"step": step})
        record |= {key: _finite(value) for key, value in metrics.items()}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class WandbTracker:
    """A Weights & Biases run whose files stay inside the run folder.

    Any failure is passed to `warn` once, and from then on this tracker does nothing.
    """

    def __init__(
        self,
        config: TrackerConfig,
        online: bool,
        run_dir: Path,
        run_name: str,
        config_dict: dict[str, Any],
        warn: Callable[[str], None],
    ) -> None:
        self._warn = warn
        self._run: Any = None
        if online and not has_wandb_credentials():
            warn(
                "tracker.wandb=online: there is no WANDB_API_KEY and no netrc entry, so Weights & "
                f"Biases is left out; metrics are in {METRICS_FILE}; use tracker.wandb=offline to "
                "sync later"
            )
            return
        try:
            self._run = _start_wandb(config, online, run_dir, run_name, config_dict)
        except Exception as error:  # wandb raises its own, OS, network and validation errors
            self._give_up(error)

    def log(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Send the metrics; `step` goes as a metric, so that a resumed run may repeat steps."""
        if self._run is None:
            return
        try:
            self._run.log(dict(metrics) | ({} if step is None else {"step": step}))
        except Exception as error:
            self._give_up(error)

    def close(self) -> None:
        """Finish the run, waiting at most a minute for the server."""
        if self._run is None:
            return
        try:
            self._run.finish()
        except Exception as error:
            self._give_up(error)
        self._run = None

    def _give_up(self, error: Exception) -> None:
        self._run = None
        reason = " ".join(str(error).split())[:200]
        self._warn(
            f"Weights & Biases is left out from here on ({type(error).__name__}: {reason}); "
            f"metrics are in {METRICS_FILE}"
        )


class _Composite:
    """Every metric to every tracker, in order."""

    def __init__(self, trackers: list[Tracker]) -> None:
        self._trackers = trackers

    def log(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        for tracker in self._trackers:
            tracker.log(metrics, step)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()


def open_tracker(
    config: TrackerConfig,
    run_dir: Path,
    run_name: str,
    config_dict: dict[str, Any],
    warn: Callable[[str], None] | None = None,
) -> Tracker:
    """The trackers that `config` asks for.

    Args:
        config: group tracker of the config.
        run_dir: run folder; everything written goes inside.
        run_name: name of the run, unless tracker.name gives one.
        config_dict: the whole config as plain values, stored with the run (it has no secrets).
        warn: gets one line when Weights & Biases fails; None prints it to stderr.
    """
    trackers: list[Tracker] = [JsonlTracker(run_dir / METRICS_FILE)]
    mode = wandb_mode(config.wandb)
    if mode != "off":
        name = config.name or run_name
        trackers.append(
            WandbTracker(
                config, mode == "online", run_dir, name, config_dict, warn or _warn_on_stderr
            )
        )
    return _Composite(trackers)


def wandb_mode(asked: str) -> str:
    """What `auto` means here: WANDB_MODE if set, else online with credentials, else offline."""
    if asked != "auto":
        return asked
    environment = _ENVIRONMENT_MODES.get(os.environ.get("WANDB_MODE", ""))
    return environment or ("online" if has_wandb_credentials() else "offline")


def has_wandb_credentials() -> bool:
    """Whether WANDB_API_KEY or a netrc entry for the server exists; never reads what it says."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    server = os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    host = urlsplit(server).hostname or ""
    paths = [os.environ.get("NETRC"), "~/.netrc", "~/_netrc"]
    for path in (Path(p).expanduser() for p in paths if p):
        try:
            if host in netrc.netrc(path).hosts:
                return True
        except (OSError, UnicodeDecodeError, netrc.NetrcParseError):
            continue  # no such file, or one that wandb could not use either
    return False


def _start_wandb(
    config: TrackerConfig, online: bool, run_dir: Path, run_name: str, config_dict: dict[str, Any]
) -> Any:
    import wandb  # costs a second, and many runs track without it

    settings = wandb.Settings(
        silent=True,
        console="off",  # standard output stays ours
        disable_git=True,  # a remote's address may hold a token
        disable_code=True,
        x_disable_meta=True,  # the command line
        init_timeout=_INIT_TIMEOUT_S,
        finish_timeout=_FINISH_TIMEOUT_S,
    )
    wandb.setup(wandb.Settings(silent=True))  # before init, which announces where it found a key
    run = wandb.init(
        project=config.project,
        name=run_name,
        dir=str(run_dir),
        config=config_dict,
        mode="online" if online else "offline",
        reinit="create_new",
        id=_wandb_id(run_dir),
        resume="allow" if online else None,
        settings=settings,
    )
    run.define_metric("*", step_metric="step")
    return run


def _wandb_id(run_dir: Path) -> str:
    """Identity of the run, kept in its folder so that a resumed run continues there."""
    path = run_dir / "wandb" / "run-id"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def _finite(value: Any) -> Any:
    """`value` as JSON takes it; one-element tensors and NumPy numbers become floats."""
    if value is None or isinstance(value, str | bool | int):
        return value
    number = float(value)
    return number if math.isfinite(number) else str(number)


def _warn_on_stderr(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)
