"""A whole model, as `bench deploy` measures it: every side in a process, its tables and targets."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from jobs.benchmarks import sides
from jobs.benchmarks.sides.decode import NEW_TOKENS, PROMPT_TOKENS, SIDES, config_of
from jobs.benchmarks.support.arguments import add_option
from jobs.benchmarks.support.processes import run_logged
from jobs.benchmarks.support.random_llama import SHAPES, write_checkpoint
from jobs.benchmarks.support.record import Chart, Table, Target, gigabytes
from sparsify.errors import InputError, TwofourError

SETTINGS = ("model", "model_sides", "model_batches", "vocabulary", "side_seconds")

NOTES = (
    f"whole model: random weights, {PROMPT_TOKENS} prompt tokens, greedy, in transformers; each "
    "side is a process of its own; seconds to the first token, and the median of those to the 12 "
    "further ones",
    "whole model: embeddings and head are dense in every side, bfloat16 but for dense float32; "
    "batches that did not fit --side-seconds are left out and named in the record; with one "
    "thread batch 1 alone",
    "vLLM (--vllm-python), where it was measured: a dense model, bfloat16, no compiled graphs; a "
    "token's seconds are a mean; its settings are its own",
    "llama.cpp (--llama-python), where it was measured: linear layers in its Q4_0, dense, 4.5 bits "
    "a weight; embeddings and head in float16",
    "peak memory is the process's with Python and torch (0.4 GB), and with making the weights",
)

_DENSE = ("dense float32", "dense bfloat16")

_PROMISED = 2.5

_ENGINES = {"vLLM": "vLLM for CPUs", "llama.cpp": "llama-cpp-python and gguf"}


def add_model_arguments(parser: ArgumentParser) -> None:
    """Options of the whole model."""
    shapes = f"shape of the whole model, or none: {', '.join(SHAPES)}"
    add_option(parser, "--model", "llama-3.2-1b", shapes)
    names = f"its sides: {', '.join(SIDES)}"
    add_option(parser, "--model-sides", list(SIDES), names, nargs="+", metavar="SIDE")
    batches = [1, 2, 4, 8, 16, 32, 64, 128, 256]
    add_option(parser, "--model-batches", batches, "prompts at once", nargs="+", metavar="N")
    add_option(parser, "--vocabulary", 128256, "its tokens")
    add_option(parser, "--side-seconds", 20.0, "for its batches, in each side")
    for name, packages in _ENGINES.items():
        python = f"Python of an environment with {packages}, to measure {name} too"
        add_option(parser, _flag(name), None, python, metavar="PATH")


def _flag(engine: str) -> str:
    return f"--{engine.lower().removesuffix('.cpp')}-python"


def check_model(options: Namespace) -> None:
    """Refuse what cannot be read, before anything is measured.

    Raises:
        InputError: a shape, side or batch that is not known.
    """
    if options.model not in ("none", *SHAPES):
        raise InputError(f"--model {options.model}: use none, or one of {', '.join(SHAPES)}")
    if unknown := [side for side in options.model_sides if side not in SIDES]:
        raise InputError(f"--model-sides {unknown[0]}: use some of {', '.join(SIDES)}")
    for name, python in (("vLLM", options.vllm_python), ("llama.cpp", options.llama_python)):
        if python is not None and not Path(python).is_file():
            raise InputError(
                f"{_flag(name)} {python}: no such file; name an environment's bin/python"
            )
    for text in options.model_batches:
        if not str(text).isdigit() or int(text) < 1:
            raise InputError(f"--model-batches {text}: write numbers of prompts, such as 1 16")


def measure_model(options: Namespace, num_threads: int) -> list[dict[str, Any]]:
    """What every side measured, one process after another; see `sides.decode.measure`.

    Raises:
        TwofourError: a side failed; its log is named.
    """
    found = []
    for side in options.model_sides:
        print(f"{options.model}, {side}", flush=True)
        place = options.workdir / f"decode-{side.replace(' ', '-')}"
        task = {
            "side": side, "shape": options.model, "vocab_size": options.vocabulary,
            "threads": sorted({1, num_threads}), "budget_s": options.side_seconds,
            "batches": sorted({int(batch) for batch in options.model_batches}),
        }  # fmt: skip
        module = "jobs.benchmarks.sides.decode"
        words = [sys.executable, "-m", module]
        found.append(run_side(side, words, task, place, {"OMP_NUM_THREADS": str(num_threads)}))
    for name, python, measure in (
        ("vLLM", options.vllm_python, _measure_vllm),
        ("llama.cpp", options.llama_python, _measure_llama),
    ):
        if python is None:
            flag = _flag(name)
            print(f"{name}: left out; {flag} names the Python of an environment with it")
            continue
        print(f"{options.model}, {name}", flush=True)
        found.append(measure(options, num_threads))
    return found


def _measure_vllm(options: Namespace, num_threads: int) -> dict[str, Any]:
    """vLLM on a dense bfloat16 model of the same shape, without its compiler: it takes minutes."""
    folder = options.workdir / f"decode-{options.model}-{options.vocabulary}"
    if not folder.is_dir():
        config = config_of(options.model, options.vocabulary)
        write_checkpoint(folder, config, 0, torch.bfloat16)
    task = {
        "folder": str(folder.absolute()), "dtype": "bfloat16", "threads": num_threads,
        "batches": sorted({int(batch) for batch in options.model_batches}),
        "budget_s": options.side_seconds, "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS, "vocab_size": options.vocabulary,
    }  # fmt: skip
    script = Path(sides.__file__).with_name("vllm_decode.py")
    environment = {
        "OMP_NUM_THREADS": str(num_threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "PYTHONPATH": "",
    }  # fmt: skip
    words = [str(options.vllm_python), str(script)]
    return run_side("vLLM", words, task, options.workdir / "decode-vllm", environment)


def _measure_llama(options: Namespace, num_threads: int) -> dict[str, Any]:
    """llama.cpp with its own 4-bit weights of the same shape."""
    folder = options.workdir.absolute()
    task = {
        "file": str(folder / f"decode-{options.model}-{options.vocabulary}.gguf"),
        "sizes": SHAPES[options.model], "vocab_size": options.vocabulary,
        "threads": sorted({1, num_threads}), "budget_s": options.side_seconds,
        "batches": sorted({int(batch) for batch in options.model_batches}),
        "prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS,
    }  # fmt: skip
    script = Path(sides.__file__).with_name("llama_decode.py")
    words = [str(options.llama_python), str(script)]
    return run_side("llama.cpp", words, task, folder / "decode-llama", {"PYTHONPATH": ""})


def run_side(
    name: str, words: list[str], task: dict[str, Any], place: Path, environment: dict[str, str]
) -> dict[str, Any]:
    """What a side's process wrote; its output is in a log.

    Raises:
        TwofourError: it failed; the log is named.
    """
    out, log = place.with_suffix(".json"), place.with_suffix(".log")
    out.unlink(missing_ok=True)
    code = run_logged([*words, json.dumps(task), str(out)], log, environment)
    if code or not out.is_file():
        raise TwofourError(f"{name}: ended with exit code {code}; see {log}")
    measured: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return measured


def model_tables(found: list[dict[str, Any]]) -> list[Table]:
    """Decoding by batch, and one prompt in detail."""
    tables = [_speed_table(found)]
    for threads in sorted({row["threads"] for side in found for row in side["rows"]}):
        lines = []
        for side in found:
            row = _row(side, threads, 1)
            if row is None:
                continue
            ratio = _ratio(found, row)
            lines.append((
                side["side"], f"{1e3 * row['first_token_s']:.0f}", f"{1e3 * row['token_s']:.1f}",
                f"{1 / row['token_s']:.2f}", "–" if ratio is None else f"{ratio:.2f}",
                gigabytes(side["num_bytes"]), gigabytes(side["peak_bytes"]),
            ))  # fmt: skip
        headings = (
            f"whole model, 1 prompt, {threads} thread(s)", "first token ms", "next ms", "tokens/s",
            "ratio", "weights", "peak memory",
        )  # fmt: skip
        if lines:
            tables.append(Table(headings, lines))
    return tables


def _speed_table(found: list[dict[str, Any]]) -> Table:
    """Tokens a second of all prompts together, by batch, with the most threads."""
    most, batches = _most_threads(found), _batches(found)
    lines = []
    for side in found:
        cells = [_rate(_row(side, most, batch)) for batch in batches]
        lines.append((side["side"], *("–" if cell is None else f"{cell:.1f}" for cell in cells)))
    name = f"tokens/s, {most} thread(s)"
    return Table((name, *(f"batch {batch}" for batch in batches)), lines)


def model_chart(found: list[dict[str, Any]]) -> Chart:
    """Tokens a second by batch."""
    most, batches = _most_threads(found), _batches(found)
    curves: dict[str, Sequence[float | None]] = {
        str(side["side"]): [_rate(_row(side, most, batch)) for batch in batches] for side in found
    }
    return Chart("Tokens a second of a whole model", "prompts at once", batches, curves)


def model_targets(found: list[dict[str, Any]]) -> list[Target]:
    """What was promised of INT4 decoding, at the worst number of threads."""
    side = next((side for side in found if side["side"] == "int4"), None)
    rows = [row for row in side["rows"] if row["batch"] == 1] if side else []
    ratios = [ratio for row in rows if (ratio := _ratio(found, row)) is not None]
    if not ratios:
        return []
    what = "whole model, int4, batch 1: least ratio over the faster dense type"
    return [Target.at_least(what, _PROMISED, min(ratios))]


def _ratio(found: list[dict[str, Any]], row: dict[str, Any]) -> float | None:
    """Seconds of the faster dense type to a further token, over these; None without one."""
    dense = [
        other["token_s"]
        for side in found
        if side["side"] in _DENSE and (other := _row(side, row["threads"], row["batch"]))
    ]
    return min(dense) / row["token_s"] if dense else None


def _row(side: dict[str, Any], threads: int, batch: int) -> dict[str, Any] | None:
    wanted = (threads, batch)
    rows = (row for row in side["rows"] if (row["threads"], row["batch"]) == wanted)
    return next(rows, None)


def _rate(row: dict[str, Any] | None) -> float | None:
    return None if row is None else row["batch"] / row["token_s"]


def _most_threads(found: list[dict[str, Any]]) -> int:
    return max(row["threads"] for side in found for row in side["rows"])


def _batches(found: list[dict[str, Any]]) -> list[int]:
    return sorted({row["batch"] for side in found for row in side["rows"]})
