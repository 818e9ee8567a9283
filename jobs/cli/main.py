"""From a command line to a typed, checked config and an exit code; the only place that knows Hydra.

Compose the YAML files, convert once, call the job. Below this module there are only dataclasses.
Exit codes: 0 done, 1 could not be finished, 2 the user's to fix, 75 stopped with a checkpoint when
asked to (the same command goes on), 130 interrupted.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import TYPE_CHECKING, NoReturn

from jobs.cli import help as _help
from jobs.cli.command import Command
from jobs.cli.compose import load_config, one_line, print_config
from sparsify.errors import InputError, StoppedEarlyError, TwofourError

if TYPE_CHECKING:
    pass

_FLAGS = ("--help", "-h", "--print-config", "--dry-run", "--version")


def main(command: Command, argv: list[str] | None = None) -> NoReturn:
    """Run a command as told by `argv` and exit.

    Args:
        command: what to run.
        argv: flags and overrides; None takes those of the process.

    Raises:
        SystemExit: always; the code is 0, 1 (failed), 2 (wrong input), 75 (stopped when asked to)
            or 130 (interrupted).
            Mistakes are one line on stderr; set TWOFOUR_DEBUG=1 to see where they were raised.
    """
    try:
        _run(command, sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except InputError as error:
        _fail(one_line(error), 2)
    except StoppedEarlyError as error:
        _fail(one_line(error), os.EX_TEMPFAIL)
    except TwofourError as error:
        _fail(one_line(error), 1)
    except KeyboardInterrupt:
        _fail("interrupted; run the same command again to go on from what is finished", 130)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:  # a bug of ours: say so and show where
        _fail(f"unexpected {type(error).__name__}: {one_line(error)}", 1, with_traceback=True)
    sys.exit(0)


def _run(command: Command, argv: list[str]) -> None:
    job = command.name
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
        print_config(config)
    if "--dry-run" in flags:
        print("\n".join(command.plan(config)))
    if "--print-config" in flags or "--dry-run" in flags:
        return
    print(command.run(config))


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


def _fail(message: str, code: int, with_traceback: bool = False) -> NoReturn:
    """Print what went wrong and exit; called while the exception is being handled."""
    print(f"error: {message}", file=sys.stderr)
    if with_traceback or os.environ.get("TWOFOUR_DEBUG") == "1":
        traceback.print_exc()
    sys.exit(code)
