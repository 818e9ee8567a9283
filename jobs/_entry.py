"""From a command line to a typed, checked config and an exit code; the only place that knows Hydra.

Compose the YAML files, convert once, call the job. Below this module there are only dataclasses.
Exit codes: 0 done, 1 could not be finished, 2 the user's to fix, 75 stopped with a checkpoint when
asked to (the same command goes on), 130 interrupted.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NoReturn

from conf.schema import ALIASES, Config, PretrainConfig, to_dict
from conf.teach import TeachJobConfig
from conf.tokenize import TokenizeJobConfig
from jobs import _help
from jobs._options import CONF_DIR, Override, config_class, parse_overrides
from sparsify.errors import InputError, StoppedEarlyError, TwofourError

if TYPE_CHECKING:
    from pathlib import Path

AnyConfig = Config | PretrainConfig | TokenizeJobConfig | TeachJobConfig

_FLAGS = ("--help", "-h", "--print-config", "--dry-run", "--version")
_TYPE_WORDS = {
    "int": "a whole number such as 8 or 1_000_000",
    "float": "a number such as 0.5 or 1e-4",
    "bool": "true or false",
    "list[str]": "a list in brackets such as [a,b] or []",
}


def main(job: str, argv: list[str] | None = None) -> NoReturn:
    """Run `job` ('prune', 'distill', ..., 'pretrain') as told by `argv` and exit.

    Args:
        job: name of the command module, and of its YAML file in conf/.
        argv: flags and overrides; None takes those of the process.

    Raises:
        SystemExit: always; the code is 0, 1 (failed), 2 (wrong input), 75 (stopped when asked to)
            or 130 (interrupted).
            Mistakes are one line on stderr; set TWOFOUR_DEBUG=1 to see where they were raised.
    """
    try:
        _run(job, sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except InputError as error:
        _fail(_one_line(error), 2)
    except StoppedEarlyError as error:
        _fail(_one_line(error), os.EX_TEMPFAIL)
    except TwofourError as error:
        _fail(_one_line(error), 1)
    except KeyboardInterrupt:
        _fail("interrupted; run the same command again to go on from what is finished", 130)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:  # a bug of ours: say so and show where
        _fail(f"unexpected {type(error).__name__}: {_one_line(error)}", 1, with_traceback=True)
    sys.exit(0)


def load_config(job: str, overrides: list[str]) -> AnyConfig:
    """The checked config of a job: its YAML, then the cluster's, then the overrides.

    Args:
        job: one of the jobs.
        overrides: `key=value` words, and at most one `+cluster=NAME` (without one: local).

    Raises:
        InputError: an unknown key, cluster or stage, a wrong type, or a rule that is broken.
    """
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    cluster, parsed = parse_overrides(job, overrides)
    words = [_to_hydra(override) for override in parsed]
    if job != "pretrain":
        words.append(f"+cluster={cluster or 'local'}")
    schema = config_class(job)
    try:
        with initialize_config_dir(str(CONF_DIR.resolve()), job_name=job, version_base="1.3"):
            composed: Any = OmegaConf.to_container(
                compose(job, overrides=words), resolve=True, throw_on_missing=True
            )
        if schema in (
            TokenizeJobConfig,
            TeachJobConfig,
        ):  # presets and prune.yaml set other groups too
            used = {field.name for field in fields(schema)}
            composed = {key: value for key, value in composed.items() if key in used}
        typed = OmegaConf.merge(OmegaConf.structured(schema), _field_names(composed))
        config: AnyConfig = OmegaConf.to_object(typed)  # type: ignore[assignment]
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(f"config of {job}: {_one_line(error)}") from error
    except InputError:
        raise
    except ValueError as error:  # the rules of ClusterSpec, which does not know sparsify's errors
        raise InputError(_one_line(error)) from error
    return config


def _run(job: str, argv: list[str]) -> None:
    flags = [word for word in argv if word.startswith("-")]
    words = [word for word in argv if not word.startswith("-")]
    if "--help" in flags or "-h" in flags:
        print(_help.render(job, words))
        return
    for flag in flags:
        _check_flag(job, flag)
    if "--version" in flags:
        print(_help.version())
        return
    config = load_config(job, words)
    if "--print-config" in flags:
        _print_config(config)
    if "--dry-run" in flags:
        print("\n".join(_plan(config)))
    if "--print-config" in flags or "--dry-run" in flags:
        return
    print(_start(job, config))


def _start(job: str, config: AnyConfig) -> Path | str:
    if isinstance(config, PretrainConfig):
        from jobs import pretrain

        pretrain.run(config)
        return config.out
    if isinstance(config, TokenizeJobConfig):
        from jobs import tokenize

        return tokenize.run(config)
    if isinstance(config, TeachJobConfig):
        from jobs import teach

        return teach.run(config)
    from jobs import pipeline

    return pipeline.run_pipeline(config, job)


def _plan(config: AnyConfig) -> list[str]:
    if isinstance(config, PretrainConfig):
        step_tokens = config.batch_size * config.sequence_length
        return [
            f"pretrain: one process on {config.device}, {config.num_threads} threads, no cluster",
            f"  model: {config.num_layers} blocks, hidden_size {config.hidden_size}, "
            + f"vocabulary {config.vocab_size}",
            f"  steps: {config.num_tokens // step_tokens} of {step_tokens} tokens",
            f"  output: {config.out}",
        ]
    if isinstance(config, TokenizeJobConfig):
        sources = config.data.train or ", ".join(config.data.mix) or config.data.calibration
        return [
            f"tokenize: {config.cluster.num_workers} workers on {config.cluster.name}",
            f"  sources: {sources}",
            f"  tokenizer: that of {config.model.path}",
            f"  rows: {config.data.sequence_length} tokens each",
            f"  output: {config.tokenize.out}",
        ]
    if isinstance(config, TeachJobConfig):
        from jobs import _teach

        return _teach.describe_plan(config)
    from jobs import pipeline

    return pipeline.describe_plan(config)


def _check_flag(job: str, flag: str) -> None:
    if flag in _FLAGS:
        return
    if flag in ("-m", "--multirun"):
        raise InputError(
            f"{flag}: sweeps are not supported; run one command per setting, for example: "
            f"for seed in 0 1 2; do python -m jobs.{job} "
            f"{'seed' if job == 'pretrain' else 'run.seed'}=$seed ...; done"
        )
    name = flag.lstrip("-")
    hint = f"; options take no dashes: {name}" if "=" in name else ""
    raise InputError(f"{flag}: unknown flag{hint}; flags are {', '.join(_FLAGS)}")


def _to_hydra(override: Override) -> str:
    """The override with its value checked against the option's type, in Hydra's grammar.

    Text is quoted, so that Hydra keeps it as it was typed: 007 stays 007, a path may hold spaces
    and parentheses. Everything else is parsed here, because later `yes` would pass for true.
    """
    option, text = override.option, override.text
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if option.type == "str" and text != "null" and not quoted:
        escaped = re.sub(r'(\\*)("|$)', lambda m: m[1] * 2 + ("\\" if m[2] else "") + m[2], text)
        return f'{option.key}="{escaped}"'
    value = _parse(option.key, text)
    if _fits(value, option.type) or (value is None and option.optional):
        return f"{option.key}={text}"
    if isinstance(value, float) and option.type == "int" and value.is_integer():
        return f"{option.key}={int(value)}"  # 1e9 is a whole number, spelled shortly
    wanted = _TYPE_WORDS.get(option.type, "text") + (" or null" if option.optional else "")
    fix = ""
    if option.type == "list[str]" and re.fullmatch(r"[\w.*/,-]+", text):
        fix = f"; write '{option.key}=[{text}]'"
    raise InputError(f"{option.key}={text}: must be {wanted}{fix}")


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


def _parse(key: str, text: str) -> Any:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import QuotedString
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_override(f"{key}={text}")
        value = parsed.value()
    except (HydraException, ValueError) as error:
        raise InputError(
            f"{key}={text}: cannot be read ({_one_line(error)}); put double quotes around text "
            f"with special signs, such as '{key}=[\"a(b)\"]'"
        ) from error
    return value.text if isinstance(value, QuotedString) else value


def _field_names(node: Any) -> Any:
    """Nested values with the names of YAML turned into the names of the dataclass fields."""
    if isinstance(node, dict):
        return {ALIASES.get(key, key): _field_names(value) for key, value in node.items()}
    return node


def _print_config(config: AnyConfig) -> None:
    from omegaconf import OmegaConf

    print(OmegaConf.to_yaml(OmegaConf.create(to_dict(config))), end="")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _fail(message: str, code: int, with_traceback: bool = False) -> NoReturn:
    """Print what went wrong and exit; called while the exception is being handled."""
    print(f"error: {message}", file=sys.stderr)
    if with_traceback or os.environ.get("TWOFOUR_DEBUG") == "1":
        traceback.print_exc()
    sys.exit(code)
