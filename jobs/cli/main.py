"""Runs a command as its words tell, and says how it went in one line and an exit code.

Exit codes: 0 done, 1 could not be finished, 2 the user's to fix, 75 stopped when asked to (SIGTERM,
a switch, a time limit) and 130 interrupted (SIGINT): after these two the same command resumes.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import Any, NoReturn

from cluster.preempt import Interrupted, end_process, handling_signals
from jobs.cli import help as _help
from jobs.cli.command import Command
from jobs.cli.options import one_line
from jobs.cli.streams import take_any_text
from sparsify.errors import InputError, MachineLostError, StoppedEarlyError, TwofourError

FLAGS = ("--help", "-h", "--version", "--print-config", "--dry-run")

_HYDRA_VALUES = {
    "--cfg": ("job", "hydra", "all"), "-c": ("job", "hydra", "all"),
    "--package": (), "-p": (), "--config-name": (), "-cn": (), "--config-dir": (), "-cd": (),
    "--config-path": (), "-cp": (), "--experimental-rerun": (),
    "--info": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
    "-i": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
}  # fmt: skip
"""Flag of Hydra with a value -> its values; () where any will do"""

HYDRA_FLAGS = (
    "--multirun", "-m", "--run", "-r", "--resolve", "--shell-completion", "-sc", "--hydra-help",
    *_HYDRA_VALUES,
)  # fmt: skip


def main(command: Command, argv: list[str] | None = None) -> NoReturn:
    """Run a command as told by `argv` and exit.

    Args:
        command: what to run.
        argv: flags and overrides; None takes those of the process.

    Raises:
        SystemExit: always; the code is 0, 1 (failed), 2 (wrong input), 69 (a machine is gone),
            75 (stopped when asked to) or 130 (interrupted).
            Mistakes are one line on stderr; set TWOFOUR_DEBUG=1 to see where they were raised.
    """
    take_any_text()
    with handling_signals(_say):
        try:
            _run(command, sys.argv[1:] if argv is None else argv)
            sys.stdout.flush()
        except InputError as error:
            _fail(one_line(error), 2)
        except StoppedEarlyError as error:
            _fail(one_line(error), os.EX_TEMPFAIL)
        except MachineLostError as error:
            _fail(one_line(error), os.EX_UNAVAILABLE)
        except TwofourError as error:
            _fail(one_line(error), 1)
        except Interrupted as interrupted:
            _fail(one_line(interrupted), interrupted.exit_code)
        except KeyboardInterrupt:
            _fail("interrupted; run the same command again to resume from what is finished", 130)
        except BrokenPipeError:  # the reader, such as `head`, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        except Exception as error:  # a bug of ours: say so and show where
            _fail(f"unexpected {type(error).__name__}: {one_line(error)}", 1, with_traceback=True)
    sys.exit(0)


def _run(command: Command, argv: list[str]) -> None:
    words, flags, hydra_flags = split_words(argv)
    if "--help" in flags or "-h" in flags:
        print(_help.render(command, words))
        return
    for flag in flags:
        if flag not in FLAGS:
            hint = f"; options take no dashes: {flag.lstrip('-')}" if "=" in flag else ""
            raise InputError(f"{flag}: unknown flag{hint}; flags are {', '.join(FLAGS)}, and "
                             f"those of Hydra: {', '.join(HYDRA_FLAGS)}")  # fmt: skip
    if "--version" in flags:
        print(_help.version())
        return
    # Here, because Hydra costs half a second that help and unknown flags do not need.
    from jobs.cli import compose, submit, sweep

    words = compose.with_recipe(command, words)
    elsewhere: list[tuple[Any, list[str]]] = []
    kept = [word for word in argv if word not in FLAGS]
    runs = compose.planned(command, words, hydra_flags, kept)
    arrays = sweep.arrays_of(runs) if runs is not None else []

    def act(config: Any) -> None:
        typed = [word for word in sys.argv[1:] if word not in FLAGS]
        if "--print-config" in flags:
            compose.print_config(config)
        if "--dry-run" in flags:
            print("\n".join(command.plan(config)))
            if submit.runs_elsewhere(config) and not arrays:
                print(submit.describe(command, config, typed))
        if not flags and submit.runs_elsewhere(config):
            if submit.has_files_here(config):
                command.plan(config)  # what would refuse the job is said now, not after the queue
            elsewhere.append((config, typed))
        elif not flags:
            print(command.run(config))

    def in_turn() -> None:
        compose.launch(command, words, hydra_flags, act, is_dry=bool(flags))

    if runs is not None and not flags:
        sweep.run_sweep(runs, in_turn)
        return
    in_turn()
    if runs is not None and "--dry-run" in flags:
        print(sweep.describe(runs, arrays), end="")
    for config, typed in elsewhere:  # here, where no Hydra is at work any more
        print(submit.submit(command, config, typed))


def split_words(argv: list[str]) -> tuple[list[str], list[str], list[str]]:
    """The `key=value` words, the flags that are ours or nobody's, and Hydra's with their values."""
    words: list[str] = []
    flags: list[str] = []
    hydra_flags: list[str] = []
    left = list(argv)
    while left:
        word = left.pop(0)
        name, equals, _ = word.partition("=")
        if not word.startswith("-"):
            words.append(word)
        elif name not in HYDRA_FLAGS:
            flags.append(word)
        else:
            hydra_flags.append(word)
            known = _HYDRA_VALUES.get(name)
            if known is None or equals:
                continue
            if left and not left[0].startswith("-") and (not known or left[0] in known):
                hydra_flags.append(left.pop(0))
            elif name not in ("--info", "-i"):
                raise InputError(f"{word}: needs a value{': ' if known else ''}{', '.join(known)}")
    return words, flags, hydra_flags


def _fail(message: str, code: int, with_traceback: bool = False) -> NoReturn:
    """Print what went wrong and exit; called while the exception is being handled."""
    print(f"error: {message}", file=sys.stderr)
    if with_traceback or os.environ.get("TWOFOUR_DEBUG") == "1":
        traceback.print_exc()
    end_process(code)


def _say(text: str) -> None:
    """Say a line while a signal is handled, where a stream may be in the middle of another."""
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"  {text}\n".encode())
