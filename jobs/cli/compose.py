"""From the words of a command line, by Hydra, to typed and checked configs; nothing else knows it.

`launch` is Hydra's own program with what people know of it. Before it, every word is looked at, so
that a mistake gets one line with the way out: Hydra then gets text as it was typed (007 stays 007,
a path may hold spaces) and numbers of the option's type. After it there are only dataclasses.
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
from hydra import compose, initialize, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
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
    Option,
    command_options,
    expand_homes,
    home_expanded,
    known_option,
    known_preset,
    one_line,
    presets,
    takes_presets,
)
from sparsify.errors import InputError, StoppedEarlyError, TwofourError

_VERSION_BASE = "1.3"

_TYPE_WORDS = {
    "int": "a whole number such as 8 or 1_000_000",
    "float": "a number such as 0.5 or 1e-4",
    "bool": "true or false",
    "list[str]": "a list in brackets such as [a,b] or []",
}

_KEY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)

_LONGEST_NAME = 120  # of the folder of a run in a sweep


def load_config(job: str, words: Sequence[str]) -> Any:
    """The checked config of `python -m jobs.<job>` with these words; runs and leaves nothing.

    Raises:
        InputError: an unknown key, preset or stage, a wrong type, or a rule that is broken.
    """
    command = find_command(job)
    _register(command)
    checked = [_checked(command, word, (CONF_DIR,), is_sweep=False) for word in words]
    folder, name = _primary(command)
    started = (
        initialize_config_dir(folder, version_base=_VERSION_BASE)
        if folder
        else initialize(folder, version_base=_VERSION_BASE)
    )
    with _mistakes(job), started:
        return _typed(command, compose(name, overrides=checked))


def _primary(command: Command) -> tuple[str | None, str]:
    """Where a command's config begins: its YAML, or its dataclass alone where it has no presets,
    whose options may have the names of groups."""
    return (str(CONF_DIR), command.name) if takes_presets(command) else (None, "options")


def launch(
    command: Command,
    words: Sequence[str],
    flags: Sequence[str],
    act: Callable[[Any], None],
    is_dry: bool = False,
) -> None:
    """Hydra's program: one run, every run of a sweep, or what its flags ask for instead.

    Args:
        command: whose options these are.
        words: `key=value` and its kin.
        flags: of Hydra, with their values.
        act: called with the checked config of every run.
        is_dry: take away the folders that Hydra makes for a sweep.

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
        is_sweep = bool({"-m", "--multirun"} & set(flags)) or "hydra.mode=MULTIRUN" in words
        folders = [CONF_DIR, *_user_folders(words, flags)]
        words = [_checked(command, word, folders, is_sweep) for word in words]
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

    program = hydra.main(*_primary(command), _VERSION_BASE)(task)
    try:
        with _mistakes(command.name), _hydra_process([*words, *flags]):
            program()
    except KeyboardInterrupt as interrupt:
        raise interrupt.__cause__ or interrupt from None
    except Exception:
        if not failed:
            raise
        kind = InputError if all(isinstance(e, InputError) for e in failed) else TwofourError
        raise kind(
            f"{len(failed)} of the sweep's runs failed, see above; the same command reuses what "
            "the others have made"
        ) from None
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
            os.removedirs(sweep)


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
    if takes_presets(command):  # whose cluster may be that of a command with stages
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
        words = [word for word in words if not word.startswith(f"{command.out}=")]
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


def _checked(command: Command, word: str, folders: Sequence[Path], is_sweep: bool) -> str:
    """A word of the command line in Hydra's grammar, its key known and its value of the type.

    Raises:
        InputError: it can mean nothing.
    """
    key, equals, text = word.partition("=")
    bare = key.lstrip("+~")
    if bare.startswith("hydra.") or set("@/") & set(bare):
        return word
    groups = presets(folders) if takes_presets(command) else {}
    if not bare or not (equals or key.startswith("~")):
        hint = ""
        if word in command_options(command):
            hint = f"; give it a value: {word}=..."
        elif bare == "cluster" and groups:
            hint = f"; write +cluster=NAME with one of: {', '.join(groups['cluster'])}"
        example = command.examples[0].split()[0]
        raise InputError(f"{word}: is not key=value without spaces, such as {example}{hint}")
    if not _KEY.fullmatch(bare):
        raise InputError(f"{word}: {bare!r} is not the name of an option")
    if key.startswith("~"):
        if bare not in groups:
            raise InputError(
                f"{word}: options have defaults and cannot be removed, only presets such as "
                f"~model; leave it out, or set {bare}=null or {bare}=[] where the option allows it"
            )
        return word
    if not text.strip():
        raise InputError(f"{word}: the value is missing; write {key}=VALUE, or leave {key} out")
    if bare == "cluster" and not groups:
        raise InputError(f"{word}: {command.name} runs in one process and takes no cluster")
    if bare == "cluster" and key != "+cluster":
        raise InputError(
            f"{word}: write it with a plus, +{bare}={text}; "
            f"there are: {', '.join(groups['cluster'])}"
        )
    if bare in groups:
        for name in text.split(",") if is_sweep else [text]:
            known_preset(word, name, groups[bare])
        return word if bare not in presets() else f"{bare}={text}"
    if text.startswith("{") and any(k.startswith(f"{bare}.") for k in command_options(command)):
        return word
    option = known_option(command, bare, text)
    if key.startswith("+") and not key.startswith("++"):
        raise InputError(f"{word}: the option exists already; write {bare}={text}")
    if is_sweep:
        with suppress(InputError):  # text that Hydra cannot read is one value
            if _override(key, text).is_sweep_override():
                return word
    return _to_hydra(option, key, text)


def _to_hydra(option: Option, key: str, text: str) -> str:
    """The override with its value checked against the option's type, in Hydra's grammar.

    Text is quoted, so that Hydra keeps it as it was typed. Everything else is parsed here, because
    later `yes` would pass for true.
    """
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if option.type_name == "str" and text != "null" and not quoted:
        escaped = re.sub(r'(\\*)("|$)', lambda m: m[1] * 2 + ("\\" if m[2] else "") + m[2], text)
        return f'{key}="{escaped}"'
    value = _override(key, text).value()
    if isinstance(value, QuotedString):
        value = value.text
    if _fits(value, option.type_name) or (value is None and option.optional):
        return f"{key}={text}"
    if isinstance(value, float) and option.type_name == "int" and value.is_integer():
        return f"{key}={int(value)}"  # 1e9 is a whole number, spelled shortly
    wanted = _TYPE_WORDS.get(option.type_name, "text") + (" or null" if option.optional else "")
    fix = ""
    if option.type_name == "list[str]" and re.fullmatch(r"[\w.*/,-]+", text):
        fix = f"; write '{key}=[{text}]'"
    elif "," in text:
        fix = "; several values need --multirun"
    raise InputError(f"{key}={text}: must be {wanted}{fix}")


def _fits(value: Any, type_name: str) -> bool:
    if isinstance(value, str) and value.startswith("${"):
        return True  # an interpolation: OmegaConf checks what it becomes
    if type_name == "list[str]":
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if type_name == "float":
        return isinstance(value, int | float) and not isinstance(value, bool)
    if type_name == "int":
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, bool if type_name == "bool" else str)


def _override(key: str, text: str) -> Any:
    try:
        override = OverridesParser.create().parse_override(f"{key}={text}")
        override.value()
    except (HydraException, ValueError) as error:
        raise InputError(
            f"{key}={text}: cannot be read ({one_line(error)}); put double quotes around text "
            f"with special signs, such as '{key}=[\"a(b)\"]'"
        ) from error
    return override


def print_config(config: Any) -> None:
    """Print every value as YAML."""
    print(OmegaConf.to_yaml(OmegaConf.create(to_dict(config))), end="")
