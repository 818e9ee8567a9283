"""The README keeps its word: its commands parse, its options, files and keys exist."""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from conf.options.run import STAGES
from conf.schema import Config
from jobs import bench, forecast
from jobs.cli.compose import load_config
from jobs.cli.main import FLAGS
from jobs.cli.options import JOBS, job_options
from jobs.pipeline import PIPELINE
from jobs.reporting.summary import _num_parameters, build_summary
from jobs.runs.artifact import RECORD
from jobs.runs.context import StageContext
from jobs.runs.models import Models
from jobs.runs.tracking import METRICS_FILE
from jobs.training.ledger import WORDS, goodput
from sparsify.formats.sparse_folder import MASKS, PACKED, SPARSITY
from sparsify.models.load import embedded_path
from sparsify.pruning.progress import PHASES, LayerReport
from sparsify.quantization.quantize import QuantLayerReport
from sparsify.training.forecast import Forecast

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
_FENCE = re.compile(r"^```\w*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
BLOCKS = _FENCE.findall(README)
SPANS = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", _FENCE.sub("", README))]
LINES = [line.partition("#")[0].strip() for block in BLOCKS for line in block.splitlines()]
COMMANDS = [text for text in (*LINES, *SPANS) if text.startswith("python -m ")]
GROUPS = [*(field.name for field in fields(Config)), "tokenize", "teach"]
OPTIONS = {**job_options("prune"), **job_options("tokenize"), **job_options("teach")}


def no_duplicates(texts: list[str]) -> list[str]:
    return list(dict.fromkeys(texts))


# --- commands and options


BENCHMARKS, FORECAST = "python -m jobs.bench", "python -m jobs.forecast"


def test_every_job_is_shown() -> None:
    shown = {re.split(r"[. ]", command)[3] for command in COMMANDS}
    assert shown == {*JOBS, "bench", "forecast"}


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith(f"{BENCHMARKS} ")])
def test_benchmark_parses(command: str) -> None:
    bench.parser().parse_args(shlex.split(command)[3:])


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith(FORECAST)])
def test_forecast_parses(command: str) -> None:
    forecast.parser().parse_args(shlex.split(command)[3:])


@pytest.mark.parametrize(
    "command", no_duplicates([c for c in COMMANDS if not c.startswith((BENCHMARKS, FORECAST))])
)
def test_command_names_a_job_and_its_words_parse(command: str) -> None:
    module, *words = shlex.split(command)[2:]
    package, _, job = module.partition(".")
    assert package == "jobs"
    assert job in JOBS
    assert (ROOT / "jobs" / f"{job}.py").is_file()
    flags = [word for word in words if word.startswith("-")]
    assert set(flags) <= set(FLAGS)
    if "--help" in flags:  # its words say which options to show
        words = [word for word in words if "=" in word]
    load_config(job, [word for word in words if word not in flags])


def mentioned_options() -> list[str]:
    assigned = re.findall(r"(?<![\w./])([a-z]+\.[a-z_0-9]+)=", README)
    named = [span for span in SPANS if re.fullmatch(rf"({'|'.join(GROUPS)})\.[a-z_0-9]+", span)]
    return no_duplicates([*assigned, *named])


def test_options_are_found_in_the_text() -> None:
    assert {"data.calibration", "run.redo", "prune.skip", "distill.zero_stage"} <= set(
        mentioned_options()
    )


@pytest.mark.parametrize("key", mentioned_options())
def test_mentioned_option_exists(key: str) -> None:
    assert key in OPTIONS


@pytest.mark.parametrize(
    "target", no_duplicates(re.findall(r"(?m)^make (\w+)|`make (\w+)`", README))
)
def test_make_target_exists(target: tuple[str, str]) -> None:
    name = target[0] or target[1]
    assert re.search(rf"^{name}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


# --- files


@pytest.mark.parametrize("path", no_duplicates(re.findall(r"\]\(([^)#]+)\)", README)))
def test_linked_file_exists(path: str) -> None:
    assert not Path(path).is_absolute()
    assert path.startswith("https://") or (ROOT / path).exists()


@pytest.mark.parametrize(
    "path",
    no_duplicates(
        [s for s in SPANS if re.fullmatch(r"(jobs|conf|cluster|sparsify|tests)/[\w./-]*", s)]
    ),
)
def test_mentioned_file_exists(path: str) -> None:
    assert (ROOT / path).exists()


def test_tree_shows_every_stage_in_order_and_names_the_files() -> None:
    tree = next(block for block in BLOCKS if block.startswith("runs/"))
    folders = re.findall(r"^[├└]── (\w+)/", tree, re.MULTILINE)
    assert folders == ["wandb", *STAGES]
    for name in (RECORD, MASKS, SPARSITY, PACKED, METRICS_FILE, "summary.json", "report.html"):
        assert name in tree


def test_places_for_the_demo_are_marked() -> None:
    start, end = README.index("<!-- demo-table -->"), README.index("<!-- /demo-table -->")
    assert start < end
    for mark in ("<!-- demo-table -->", "<!-- /demo-table -->"):
        assert README.count(mark) == 1


def test_size_of_the_embedded_model() -> None:
    assert f"a Llama of {_num_parameters(embedded_path()):,} parameters" in " ".join(README.split())


# --- summary.json


def documented_keys() -> dict[str, list[str]]:
    """Section -> keys of the README's table; `top` stands for the file itself."""
    table = README.split("| section | keys | meaning |\n|---|---|---|\n")[1].split("\n\n")[0]
    found: dict[str, list[str]] = {}
    for line in table.splitlines():
        section, keys = line.split("|")[1:3]
        found.setdefault(section.strip(" `"), []).extend(re.findall(r"`(\w+)`", keys))
    return found


def literal_keys(job: str, function: str, key: str) -> list[str]:
    """Keys of the dict with `key` in it that is written out in a function of a job's module."""
    tree = ast.parse((ROOT / "jobs" / f"{job}.py").read_text(encoding="utf-8"))
    found = [
        [item.value for item in node.keys if isinstance(item, ast.Constant)]
        for scope in ast.walk(tree)
        if isinstance(scope, ast.FunctionDef) and scope.name == function
        for node in ast.walk(scope)
        if isinstance(node, ast.Dict)
    ]
    matching = [keys for keys in found if key in keys]
    assert len(matching) == 1, f"jobs/{job}.py, {function}: {matching}"
    return matching[0]


def stage_metrics() -> dict[str, dict[str, Any]]:
    """Metrics of every stage, with the keys that the stages write."""
    layer = dict.fromkeys(["method", *(field.name for field in fields(LayerReport))], 0)
    quantized = dict.fromkeys([field.name for field in fields(QuantLayerReport)], 0)
    step = dict.fromkeys(literal_keys("training/loop", "_step", "grad_norm"), 0)
    quantization = dict.fromkeys(literal_keys("stages/quantize", "run", "group_size"), 0)
    recovery = dict.fromkeys(
        literal_keys("workers/distill", "distill_on_worker", "tokens_per_s"), 0
    )
    score = dict.fromkeys(literal_keys("workers/evaluate", "total", "kl"), 1.0)
    gate = {"num_violations": 0}
    return {
        "prune": {
            "pattern": "2:4", "method": "wanda", "layers": [layer], "gate": {"wanda": gate},
            "seconds": {"wanda": 1.0}, "phases": {"wanda": dict.fromkeys(PHASES, 0.1)},
        },
        "distill": {
            **recovery, "steps": [step], "gate": gate, "forecast": Forecast(9, 0, 0, 0.8).as_dict(),
            "goodput": {**goodput([], 0.0, 1.0), "seconds": dict.fromkeys(WORDS, 1.0)},
        },
        "evaluate": {"results": {"dense": score, "wanda": score, "recovered": score}},
        "quantize": {
            "results": {"recovered_int4": score}, "gate": gate, "packed_bytes": 1,
            "quantization": {**quantization, "layers": [quantized]},
        },
        "export": {"packed_bytes": {"recovered": 1}},
    }  # fmt: skip


def sections(node: dict[str, Any], name: str = "top") -> Iterator[tuple[str, list[str]]]:
    """(section, keys) of a summary and of every dict inside; `versions` holds names, not keys."""
    yield name, sorted(node)
    prefix = "" if name == "top" else f"{name}."
    for key, value in node.items():
        if isinstance(value, dict) and key != "versions":
            yield from sections(value, prefix + key)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for item in value:
                yield from sections(item, f"{prefix}{key}[]")


def test_table_of_summary_keys_is_what_the_builder_writes(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    for stage, metrics in stage_metrics().items():
        (tmp_path / stage).mkdir()
        record = {"metrics": {**metrics, "warnings": ["one"]}, "duration_s": 1.0}
        (tmp_path / stage / RECORD).write_text(json.dumps(record), encoding="utf-8")
    nothing: Any = None
    one = tiny_model_dir
    made = {"prune": {"wanda": one}, "distill": {"recovered": one}, "quantize": {"packed": one}}
    models = Models(one, PIPELINE, made, "wanda")
    context = StageContext(
        Config(), Config(), tmp_path, "command", models, nothing, nothing, nothing
    )
    summary = build_summary(tmp_path, context)
    assert f"schema is {summary['schema']}" in README
    written: dict[str, list[str]] = {}
    for section, keys in sections(summary):
        assert written.setdefault(section, keys) == keys, f"rows of {section} differ in keys"
    documented = {section: sorted(keys) for section, keys in documented_keys().items()}
    assert documented == written
