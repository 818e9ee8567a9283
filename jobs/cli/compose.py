"""From the words of a command line, by Hydra, to typed and checked configs; nothing else runs it.

`launch` is Hydra's own program with what people know of it. Before it, every word is looked at
(jobs/cli/words.py); after it there are only dataclasses.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cluster.spec import ClusterSpec
from cluster.stages import StagedClusterSpec
from conf.schema import ALIASES, Config, to_dict, written_name
from jobs.cli.command import Command, find_command
from jobs.cli.completion import completed
from jobs.cli.options import (
    CONF_DIR,
    command_options,
    expand_homes,
    home_expanded,
    known_option,
    one_line,
)
from jobs.cli.recipe import with_recipe
from jobs.cli.sweep import Run, Sweep
from jobs.cli.words import checked_word
from sparsify.errors import InputError, StoppedEarlyError, TwofourError

_VERSION_BASE = "1.3"

_HOW = "cluster.sweep_jobs="  # names no run: it decides nothing of one

_OTHERS = ("hydra/launcher=", "hydra/sweeper=")

_LONGEST_NAME = 120  # of the folder of a run in a sweep


__all__ = ["launch", "load_config", "planned", "print_config", "with_recipe"]


def load_config(job: str, words: Sequence[str]) -> Any:
    """The checked config of `python -m jobs.<job>` with these words; runs and leaves nothing.

    Raises:
        InputError: an unknown key, preset or stage, a wrong type, or a rule that is broken.
    """
    command = find_command(job)
    _register(command)
    words = with_recipe(command, words)
    checked = [checked_word(command, word, (CONF_DIR,), is_sweep=False) for word in words]
    with _mistakes(job), initialize_config_dir(str(CONF_DIR), version_base=_VERSION_BASE):
        return _typed(command, compose(command.name, overrides=checked))


def planned(
    command: Command, words: Sequence[str], flags: Sequence[str], typed: Sequence[str]
) -> Sweep | None:
    """Every run of a sweep, composed and checked before the first begins; leaves nothing.

    None for a single run, and with a launcher or sweeper of somebody else, which may not want all
    runs to be made by this process, or to know them before.

    Args:
        command, words, flags: as `launch`.
        typed: all words of the command line that are to be kept.

    Raises:
        InputError: as `launch`, of any of the runs.
    """
    if not _is_sweep(words, flags) or any(word.startswith(_OTHERS) for word in words):
        return None
    runs: list[Run] = []
    folder = Path()

    def keep(config: Any) -> None:
        nonlocal folder
        setting = HydraConfig.get()
        folder = Path(setting.sweep.dir).absolute()
        runs.append(Run(config, sys.argv[1:], Path(setting.runtime.output_dir).absolute()))

    launch(command, words, flags, keep, is_dry=True, is_plan=True)
    if not runs:  # completion for a shell
        return None
    return Sweep(
        command, shlex.join(["python", "-m", f"jobs.{command.name}", *typed]), folder, runs
    )


def _is_sweep(words: Sequence[str], flags: Sequence[str]) -> bool:
    return bool({"-m", "--multirun"} & set(flags)) or "hydra.mode=MULTIRUN" in words


def launch(
    command: Command,
    words: Sequence[str],
    flags: Sequence[str],
    act: Callable[[Any], None],
    is_dry: bool = False,
    is_plan: bool = False,
) -> None:
    """Hydra's program: one run, every run of a sweep, or what its flags ask for instead.

    Args:
        command: whose options these are.
        words: `key=value` and its kin.
        flags: of Hydra, with their values.
        act: called with the checked config of every run.
        is_dry: take away the folders that Hydra makes for a sweep.
        is_plan: `act` does nothing yet; say nothing but mistakes.

    Raises:
        InputError: as `load_config`; or all that failed in a sweep were the user's mistakes.
        TwofourError: runs of a sweep failed.
        Exception: what `act` raised in a single run, or when it was asked to stop.
    """
    _register(command)
    if {"-sc", "--shell-completion"} & set(flags):
        if completed(list(words)):
            return
    else:
        is_sweep = _is_sweep(words, flags)
        folders = [CONF_DIR, *_user_folders(words, flags)]
        words = [checked_word(command, word, folders, is_sweep) for word in words]
    typed_argv = sys.argv
    failed: list[Exception] = []

    def task(composed: DictConfig) -> None:
        setting = HydraConfig.get()
        sys.argv = typed_argv
        is_sweep = setting.mode == RunMode.MULTIRUN
        if is_sweep:
            folder = os.path.relpath(setting.runtime.output_dir)
            if folder.startswith(".."):
                folder = setting.runtime.output_dir
            OmegaConf.update(composed, command.out, folder)
            own = _as_typed(command, setting.overrides.task)
            sys.argv = [typed_argv[0], *own, f"{command.out}={folder}"]  # for the run's record
            if not is_plan:
                print(f"--- {shlex.join(sys.argv[1:])}", flush=True)
        try:
            with _mistakes(command.name):
                config = _typed(command, composed)
            act(config)
        except Exception as error:
            failed.append(error)
            if isinstance(error, StoppedEarlyError) and is_sweep:
                raise KeyboardInterrupt from error  # no other run of the sweep is wanted either
            if is_sweep:
                print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
                if not isinstance(error, TwofourError):  # a bug of ours: show where
                    traceback.print_exc()
                raise  # for Hydra, which goes through the other runs first
        finally:
            if is_dry and is_sweep:
                _remove_empty(Path(folder), Path(setting.sweep.dir))

    program = hydra.main(str(CONF_DIR), command.name, _VERSION_BASE)(task)
    try:
        with _mistakes(command.name), _hydra_process([*words, *flags]):
            program()
    except KeyboardInterrupt as interrupt:
        raise interrupt.__cause__ or interrupt from None
    except Exception:
        if not failed:
            raise
        kind = InputError if all(isinstance(e, InputError) for e in failed) else TwofourError
        after = (
            "are refused, see above; none was started" if is_plan else
            "failed, see above; the same command reuses what the others have made"
        )  # fmt: skip
        raise kind(f"{len(failed)} of the sweep's runs {after}") from None
    if failed:
        raise failed[0]


def _as_typed(command: Command, words: Sequence[str]) -> list[str]:
    """Words of one run of a sweep as people type them, without the folder."""
    words = [re.sub(r'^([^=]*)="([^"\\]*)"$', r"\1=\2", word) for word in words]
    words = [re.sub(r"^cluster=", "+cluster=", word) for word in words]
    return [word for word in words if not word.startswith(f"{command.out}=")]


def _remove_empty(folder: Path, sweep: Path) -> None:
    """Take away what Hydra made for a run of a sweep in which nothing ran."""
    with suppress(OSError):  # there is something in it
        folder.rmdir()
        if set(os.listdir(sweep)) <= {"multirun.yaml"}:
            (sweep / "multirun.yaml").unlink(missing_ok=True)
            here, empty = Path.cwd(), sweep.absolute()
            while empty != here and empty not in here.parents:
                empty.rmdir()
                empty = empty.parent if here in empty.parents else here  # others' are left


@contextmanager
def _hydra_process(argv: list[str]) -> Iterator[None]:
    """The process as `hydra.main` wants it: its words, and errors that come out of it."""
    typed_argv, told = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = [typed_argv[0], *argv], "1"
    try:
        yield
    finally:
        sys.argv = typed_argv
        os.environ.pop("HYDRA_FULL_ERROR")
        if told is not None:
            os.environ["HYDRA_FULL_ERROR"] = told


@contextmanager
def _mistakes(job: str) -> Iterator[None]:
    """What Hydra and the rules find wrong, as one line for the user."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        cause = f": {one_line(error.__cause__)}" if error.__cause__ is not None else ""
        raise InputError(f"config of {job}: {one_line(error)}{cause}") from error
    except InputError:
        raise
    except ValueError as error:  # ClusterSpec's rules, which do not know of sparsify's errors
        raise InputError(one_line(error)) from error


def _register(command: Command) -> None:
    """Give Hydra the command's options as `options`, which its YAML begins with."""
    whole, part = _sweep_folders(command)
    OmegaConf.register_new_resolver("sweep_folder", whole, replace=True)
    OmegaConf.register_new_resolver("run_folder", part, replace=True)
    typed = OmegaConf.structured(command.config)
    # Presets are of a cluster that may be that of a command with stages.
    typed.cluster = OmegaConf.structured(StagedClusterSpec)
    options: dict[str, Any] = {name: typed._get_node(name) for name in typed}
    for group, node in options.items():
        if isinstance(node, DictConfig) and set(ALIASES.values()) & set(node):
            # A name that Python does not allow for a field: the same typed values in a plain node.
            plain = {written_name(str(name)): node._get_node(name) for name in node}
            options[group] = OmegaConf.create(plain)
    options["hydra"] = {
        "output_subdir": None,
        "run": {"dir": "."},
        "sweep": {"dir": "${sweep_folder:}", "subdir": "${run_folder:}"},
        "job": {"name": command.name},
    }
    options["defaults"] = [
        {"override hydra/job_logging": "none"}, {"override hydra/hydra_logging": "none"},
    ]  # fmt: skip
    ConfigStore.instance().store("options", options, provider="twofour")


def _sweep_folders(command: Command) -> tuple[Callable[..., str], Callable[..., str]]:
    """The folder of a sweep and, in it, of one of its runs, read off the config of either."""

    def whole(*, _root_: DictConfig) -> str:
        """What the command was told to write to, which now holds the folders of its runs."""
        told = OmegaConf.select(_root_, command.out)
        is_default = told == command_options(command)[command.out].default
        return "runs/sweep" if is_default else home_expanded(command.out, told)

    def part(*, _root_: DictConfig) -> str:
        """Named by the run's own words, so that the same command finds it again."""
        words = [str(word).lstrip("+") for word in _root_.hydra.overrides.task]
        words = [word for word in words if not word.startswith((f"{command.out}=", _HOW))]
        name = "_".join(re.sub(r"[^\w.-]+", "-", word).strip("-") for word in words) or "run"
        if len(name) <= _LONGEST_NAME:
            return name
        return f"{name[: _LONGEST_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"

    return whole, part


def _user_folders(words: Sequence[str], flags: Sequence[str]) -> list[Path]:
    """Folders of presets that the user names."""
    found = []
    for flag, value in zip(flags, [*flags[1:], ""], strict=False):
        name, equals, text = flag.partition("=")
        if name in ("-cd", "--config-dir", "-cp", "--config-path"):
            found.append(text if equals else value)
    for word in words:
        if word.startswith("hydra.searchpath="):
            found += re.findall(r"[^\[\],'\"]+", word.partition("=")[2])
    return [Path(path.removeprefix("file://")) for path in found]


def _typed(command: Command, composed: DictConfig) -> Any:
    """The dataclass of a composed config.

    Raises:
        InputError: a key that no command has, or a rule that is broken.
    """
    plain: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    used = {written_name(field.name) for field in fields(command.config)}
    for key in set(plain) - used - {field.name for field in fields(Config)}:
        known_option(command, str(key), str(plain[key]))
    # Presets set groups that the command may not have.
    plain = {key: value for key, value in plain.items() if key in used}
    if get_type_hints(command.config).get("cluster") is ClusterSpec:
        plain["cluster"].pop("stages")
    expand_homes(command, plain)
    return OmegaConf.to_object(
        OmegaConf.merge(OmegaConf.structured(command.config), _field_names(plain))
    )


def _field_names(node: Any) -> Any:
    """Nested values with the names of YAML turned into the names of the dataclass fields."""
    if isinstance(node, dict):
        return {ALIASES.get(key, key): _field_names(value) for key, value in node.items()}
    return node


def print_config(config: Any) -> None:
    """Print every value as YAML."""
    print(OmegaConf.to_yaml(OmegaConf.create(to_dict(config))), end="")
