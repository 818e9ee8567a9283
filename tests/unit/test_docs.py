"""README and docs keep their word: commands, options, files, links, and figures of the records."""

from __future__ import annotations

import ast
import importlib
import itertools
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from conf.options.run import STAGES
from conf.schema import Config
from jobs import bench, forecast, manage, plan
from jobs.benchmarks import budget, demo, drop, families, finetune, quality, recovery
from jobs.benchmarks import plan as planning
from jobs.benchmarks.support.commands import markdown_table
from jobs.cli.compose import load_config
from jobs.cli.main import FLAGS, split_words
from jobs.cli.options import JOBS, job_options, presets
from jobs.harness.plan import Row
from jobs.harness.results import Comparison
from jobs.pipeline import PIPELINE
from jobs.reporting.summary import _num_parameters, build_summary
from jobs.runs.artifact import RECORD
from jobs.runs.context import StageContext
from jobs.runs.models import Models
from jobs.runs.tracking import METRICS_FILE
from jobs.training.ledger import WORDS, goodput
from sparsify.files import embedded_path
from sparsify.formats.sparse_folder import MASKS, SPARSITY
from sparsify.methods import available_methods
from sparsify.pruning.progress import PHASES, LayerReport
from sparsify.quantization.quantize import QuantLayerReport
from sparsify.training.forecast import Forecast
from tests.conftest import stage_record

PLAN_RECORD = "2026-12-01-bench-plan-cpu.json"
ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"
_FENCE = re.compile(r"^```\w*\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Page:
    """A Markdown file, taken apart."""

    name: str
    """path from the root, for messages"""
    text: str

    @property
    def blocks(self) -> list[str]:
        """What stands in fences."""
        return _FENCE.findall(self.text)

    @property
    def spans(self) -> list[str]:
        """What stands in back quotes, on one line each."""
        return [" ".join(s.split()) for s in re.findall(r"`([^`]+)`", _FENCE.sub("", self.text))]

    @property
    def commands(self) -> list[str]:
        """Every command line that is written out in full."""
        lines = [
            line.split(" #")[0].strip() for block in self.blocks for line in block.splitlines()
        ]
        lines = [re.sub(r"^[A-Z_]+=\S+ ", "", line) for line in lines]  # RAY_ADDRESS=... python -m
        return [t for t in (*lines, *self.spans) if t.startswith(("python -m ", "make "))]


def page(path: str) -> Page:
    """A page by its path from the root."""
    return Page(path, (ROOT / path).read_text(encoding="utf-8"))


DOCS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))
PAGES = [page(path) for path in ("README.md", "CONTRIBUTING.md", *DOCS)]
RUN_FOLDER = page("docs/run-folder.md").text
GROUPS = [
    *(field.name for field in fields(Config)),
    "curate",
    "tokenize",
    "teach",
    "plan",
    "preflight",
]
OPTIONS = {
    k: o
    for job in ("plan", "preflight", "curate", "tokenize", "teach")
    for k, o in job_options(job).items()
}


def by_page(find: Any) -> list[Any]:
    """Parameters (page, found) of what `find(page)` lists, each once a page."""
    return [
        pytest.param(one, found, id=f"{one.name}: {found}"[:100])
        for one in PAGES
        for found in dict.fromkeys(find(one))
    ]


# --- commands and options


def commands_of(kind: str) -> list[Any]:
    return by_page(lambda one: [c for c in one.commands if re.match(rf"{kind}( |$)", c)])


def test_every_command_is_shown() -> None:
    shown = {
        re.split(r"[. ]", c)[3]
        for one in PAGES
        for c in one.commands
        if re.match("python.*jobs.\\w", c)
    }
    assert shown == {*JOBS, "bench", "forecast", "manage"}


@pytest.mark.parametrize(("where", "command"), commands_of(r"python -m jobs\.bench"))
def test_benchmark_parses(where: Page, command: str) -> None:
    bench.parser().parse_args(shlex.split(command)[3:])


@pytest.mark.parametrize(("where", "command"), commands_of(r"python -m jobs\.forecast"))
def test_forecast_parses(where: Page, command: str) -> None:
    forecast.parser().parse_args(shlex.split(command)[3:])


@pytest.mark.parametrize(("where", "command"), commands_of(r"python -m jobs\.manage"))
def test_manage_parses(where: Page, command: str) -> None:
    manage.parser().parse_args(shlex.split(command)[3:])


@pytest.mark.parametrize(
    ("where", "command"),
    commands_of(r"python -m (?!jobs\.(?:bench|forecast|manage)\b|jobs\.<|vllm\.)\S+"),
)
def test_command_names_a_job_and_its_words_parse(where: Page, command: str) -> None:
    module, *words = shlex.split(re.sub(r"\$\(.*\)", "PATH", command))[2:]
    package, _, job = module.partition(".")
    assert package == "jobs"
    assert job in JOBS
    assert (ROOT / "jobs" / f"{job}.py").is_file()
    words, flags, hydra_flags = split_words(plan.words_of(words) if job == "plan" else words)
    assert set(flags) <= set(FLAGS)
    if "--help" in flags:  # its words say which options to show
        words = [word for word in words if "=" in word]
    if "--config-dir" in hydra_flags:  # presets that the reader has
        words = [word for word in words if not word.endswith("=mine")]
    words = [word for word in words if word != "run.recipe=recipe.yaml"]  # a file they have too
    choices = [word.split(",") if "--multirun" in hydra_flags else [word] for word in words]
    for picked in itertools.product(*choices):
        keys = [word.partition("=")[0] for word in words]
        load_config(job, [
            word if "=" in word else f"{key}={word}" for key, word in zip(keys, picked, strict=True)
        ])  # fmt: skip


@pytest.mark.parametrize(("where", "command"), commands_of("make"))
def test_make_target_exists(where: Page, command: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{command.split()[1]}:", makefile, re.MULTILINE)


def mentioned_options(one: Page) -> list[str]:
    assigned = re.findall(r"(?<![\w./])([a-z]+\.[a-z_0-9]+)=", one.text)
    named = [span for span in one.spans if re.fullmatch(rf"({'|'.join(GROUPS)})\.[a-z_0-9]+", span)]
    return [
        key
        for key in (*assigned, *named)
        if key.split(".")[0] in GROUPS and not key.endswith(".py")
    ]


def test_options_are_found_in_the_text() -> None:
    found = {key for one in PAGES for key in mentioned_options(one)}
    assert {"data.calibration", "run.redo", "prune.skip", "distill.zero_stage"} <= found


@pytest.mark.parametrize(("where", "key"), by_page(mentioned_options))
def test_mentioned_option_exists(where: Page, key: str) -> None:
    keys = {str(field.name) for field in fields(Forecast)} | {"goodput", "heldout"}
    assert key in OPTIONS or (key.startswith("recovery.") and key.split(".")[1] in keys)


PYTHON = by_page(lambda one: re.findall(r"(?ms)^```python\n(.*?)^```$", one.text))


@pytest.mark.parametrize(("where", "code"), PYTHON)
def test_python_imports_what_there_is(where: Page, code: str) -> None:
    for node in ast.parse(code).body:
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            assert [name.name for name in node.names if not hasattr(module, name.name)] == []


def test_pruning_without_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (code,) = [c for one in PAGES for c in re.findall(r"(?ms)^```python\n(.*?)^```$", one.text)
               if "prune_model" in c]  # fmt: skip
    names: dict[str, Any] = {}
    exec(code, names)
    assert len(names["masks"]) == 28


# --- files


@pytest.mark.parametrize(
    ("where", "target"), by_page(lambda one: re.findall(r"\]\(([^)]+)\)", _FENCE.sub("", one.text)))
)
def test_link_leads_somewhere(where: Page, target: str) -> None:
    if target.startswith("https://"):
        return
    path, _, anchor = target.partition("#")
    file = (ROOT / where.name).parent / path if path else ROOT / where.name
    assert file.resolve().is_relative_to(ROOT)
    assert file.exists()
    if where.name.startswith("docs/"):  # the site has nothing else
        assert file.resolve().is_relative_to(ROOT / "docs")
    if anchor:
        headings = re.findall(r"(?m)^#+ (.*)$", file.read_text(encoding="utf-8"))
        slugs = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}
        assert anchor in slugs


_PLACES = re.compile(r"(jobs|conf|cluster|sparsify|tests|docs)(/[\w./-]+)?")


@pytest.mark.parametrize(
    ("where", "path"),
    by_page(lambda one: [s for s in one.spans if _PLACES.fullmatch(s) and ("/" in s)]),
)
def test_mentioned_file_exists(where: Page, path: str) -> None:
    assert (ROOT / path).exists()


def test_code_names_pages_that_exist() -> None:
    missing = [
        (path.name, name)
        for top in ("jobs", "conf", "cluster", "sparsify", "tests")
        for path in (ROOT / top).rglob("*.py")
        for name in re.findall(r"\bdocs/[\w/-]+\.md", path.read_text(encoding="utf-8"))
        if not (ROOT / name).exists()
    ]
    assert missing == []


def test_menu_of_the_site_has_every_page() -> None:
    menu = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]

    def files(node: Any) -> Iterator[str]:
        if isinstance(node, str):
            yield f"docs/{node}"
        for child in node.values() if isinstance(node, dict) else ():
            yield from files(child)
        for child in node if isinstance(node, list) else ():
            yield from files(child)

    assert sorted(files(menu)) == DOCS


def test_readme_is_one_page_and_its_map_is_true() -> None:
    readme = page("README.md")
    assert len(readme.text.splitlines()) <= 125
    shown = next(block for block in readme.blocks if block.startswith("jobs/pipeline.py"))
    paths = re.findall(r"\b(?:jobs|sparsify|conf|cluster|tests|docs)/(?:[\w.]+/?)?", shown)
    assert len(paths) >= 10
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_room_is_in_architecture() -> None:
    rooms = {
        path.parent.relative_to(ROOT).as_posix()
        for top in ("jobs", "conf", "cluster", "sparsify")
        for path in (ROOT / top).rglob("__init__.py")
    }
    inner = {"jobs/benchmarks/sides", "jobs/benchmarks/support", "conf/options", "cluster/runtime"}
    named = re.findall(r"(?m)^\| `([\w/]+)` \|", page("docs/architecture.md").text)
    assert rooms - inner <= set(named)


def test_tables_name_every_method_and_cluster() -> None:
    def first_column(path: str, heading: str) -> set[str]:
        table = page(path).text.split(heading)[1].split("\n\n")[0]
        return set(re.findall(r"(?m)^\| `([\w-]+)` \|", table))

    assert first_column("docs/pruning.md", "| method | what it does |") == set(available_methods())
    clusters = {path.stem for path in (ROOT / "conf" / "cluster").glob("*.yaml")}
    assert first_column("docs/clusters.md", "| name | what it is |") == clusters
    table = page("docs/command-line.md").text.split("| group | names |")[1].split("\n\n")[0]
    for group, names in presets().items():
        row = re.search(rf"(?m)^\| `\+?{group}=` \| (.*)$", table)
        assert row is not None
        assert set(re.findall(r"`([\w.-]+)`", row[1])) == set(names)


def test_tree_shows_every_stage_in_order_and_names_the_files() -> None:
    tree = next(b for b in page("docs/run-folder.md").blocks if b.startswith("runs/"))
    folders = re.findall(r"^[├└]── (\w+)/", tree, re.MULTILINE)
    assert folders == ["wandb", *STAGES]
    for name in (RECORD, MASKS, SPARSITY, METRICS_FILE, "summary.json", "report.html"):
        assert name in tree


def test_size_of_the_embedded_model() -> None:
    text = " ".join(page("docs/own-model.md").text.split())
    assert f"a Llama of {_num_parameters(embedded_path()):,} parameters" in text


# --- figures


@cache
def record(name: str) -> dict[str, Any]:
    """A record of docs/results."""
    return dict(json.loads((RESULTS / name).read_text(encoding="utf-8")))


_FACTORS = {
    "%": 100, "GB": 1e-9, "MB": 1e-6, "minutes": 1 / 60, "million": 1e-6, "s": 1, "": 1,
}  # fmt: skip


def as_written(text: str, value: float) -> str:
    """`value` with the digits and the unit that `text` has: '63.5 %' of 0.6348 is '63.5 %'."""
    digits, _, unit = text.partition(" ")
    if digits.endswith("000"):  # 867,000
        return f"{round(value, -3):,.0f}" + (f" {unit}" if unit else "")
    decimals = len(digits.partition(".")[2])
    return f"{value * _FACTORS[unit]:,.{decimals}f}" + (f" {unit}" if unit else "")


def quoted(one: Page) -> list[tuple[str, str, str]]:
    """(record, text, key) of every figure that a comment of the page names."""
    found = []
    text = re.sub(r"`[^`\n]+`", "", one.text)  # a comment that is shown is no comment
    for name, pairs in re.findall(r"<!-- record ([\w.-]+):\s(.*?)-->", text, re.DOTALL):
        for pair in " ".join(pairs.split()).split(";"):
            figure, _, key = pair.partition(" = ")
            found.append((name, figure.strip(), key.strip()))
    return found


@pytest.mark.parametrize(("where", "figure"), by_page(quoted))
def test_figure_is_the_records(where: Page, figure: tuple[str, str, str]) -> None:
    name, text, key = figure
    value: Any = record(name)
    for part in key.split("."):
        value = value[part]
    assert as_written(text, value) == text
    before = re.sub(
        r"<!--.*?-->", " ", where.text[: where.text.index(f"<!-- record {name}")], flags=re.S
    )
    section = " ".join(before[max(before.rfind("\n## "), 0) :].split())
    words = text.split(" ")[0] if text.endswith("%") else text  # '63.5, 52.2 and 53.2 %'
    assert re.search(rf"(?<![\d.,]){re.escape(words)}(?!\d|[.,]\d)", section), f"not said: {text}"


def test_records_are_found_and_all_are_listed() -> None:
    assert len([f for one in PAGES for f in quoted(one)]) >= 40
    listed = re.findall(r"\]\(([\w.-]+\.json)\)", page("docs/results/README.md").text)
    assert sorted(listed) == sorted(path.name for path in RESULTS.glob("*.json"))


def test_part_of_the_readme_is_the_demos_record() -> None:
    newest = max(path.name for path in RESULTS.glob("*demo-cpu.json"))
    figures = record(newest).get("figures", record(newest))  # older ones are the summary itself
    part = page("README.md").text.split(demo.BEGIN)[1].split(demo.END)[0]
    assert part.lstrip("\n") == demo.markdown(figures)


RENAMED = {
    "resolve": "sparsegpt_refit", "teacher": "sparsegpt_teacher", "descent": "group_descent",
}  # fmt: skip
"""methods as the records call them -> what they are called now"""


def test_tables_of_quality_are_the_records() -> None:
    for model, found in record("2026-11-21-bench-quality-cpu.json")["figures"].items():
        now = {RENAMED.get(method, method): row for method, row in found.items()}
        table = markdown_table(quality.table_of(model, now))
        assert table.strip() in page("docs/benchmarks/quality.md").text


def test_page_of_families_is_the_records() -> None:
    """All families, and those whose experts have been pruned since, made again."""
    days = ("2026-11-29", "2026-11-30", "2026-12-01")
    found = [record(f"{day}-bench-families-cpu.json") for day in days]
    figures = {name: own for one in found for name, own in one["figures"].items()}
    commands = "\n".join(one["command"] for one in found)
    assert page("docs/families.md").text == families.markdown(figures, commands)


@pytest.mark.parametrize("place", ["tables", "dense-weights", "twofour"])
def test_tables_of_recovery_are_the_records(place: str) -> None:
    text = page("docs/benchmarks/recovery.md").text
    part = text.split(f"<!-- {place}: begin -->")[1].split(f"<!-- {place}: end -->")[0]
    name = f"2026-11-21-bench-recovery-{place}-cpu.json".replace("-tables", "")
    figures = record(name)["figures"]
    assert re.findall(r"(?m)^### (.*)$", part) == list(figures)
    for model, found in figures.items():
        assert markdown_table(recovery.table_of(model, found)).strip() in part


def test_table_of_the_budget_is_the_record() -> None:
    text, found = page("docs/pretrain.md").text, record("2026-11-30-bench-budget-cpu.json")
    part = text.split("<!-- budget: begin -->")[1].split("<!-- budget: end -->")[0]
    assert part.strip() == markdown_table(budget.table_of(found["figures"])).strip()


@pytest.mark.parametrize(
    ("benchmark", "place", "date"),
    [
        (drop, "tables", "2026-11-30"), (finetune, "tables", "2026-11-30"),
        (finetune, "stories260k", "2026-12-01"),
    ],
)  # fmt: skip
def test_tables_of_a_stage_are_the_records(benchmark: Any, place: str, date: str) -> None:
    name = benchmark.__name__.rpartition(".")[2]
    found = record(f"{date}-bench-{name}-{place}-cpu.json".replace("-tables", ""))
    text = page(f"docs/{name}.md").text
    part = text.split(f"<!-- {place}: begin -->")[1].split(f"<!-- {place}: end -->")[0]
    assert part.strip() == benchmark.markdown(found["figures"], found["command"])


def test_tables_of_planning_are_the_records() -> None:
    text, found = page("docs/plan.md").text, record(PLAN_RECORD)["figures"]
    for place, table in (
        ("runs", planning.table_of_runs(found["runs"])[0]),
        ("published", planning.table_of_published(found["published"])),
    ):
        part = text.split(f"<!-- {place}: begin -->")[1].split(f"<!-- {place}: end -->")[0]
        assert part.strip() == markdown_table(table).strip()


# --- summary.json


def documented_keys() -> dict[str, list[str]]:
    """Section -> keys of the table in run-folder.md; `top` stands for the file itself."""
    table = RUN_FOLDER.split("| section | keys | meaning |\n|---|---|---|\n")[1].split("\n\n")[0]
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


def asked_tasks() -> dict[str, Any]:
    """What a stage says of benchmark tasks: two of one document, and their mean."""
    metric = {"score": 1.0, "stderr": None, "higher_is_better": True, "link": "mean",
              "values": [1.0], "denominators": None}  # fmt: skip
    result = {"num_fewshot": 0, "num_documents": 1, "dataset": ["json", None], "doc_hashes": ["a"],
              "metrics": {"acc,none": metric}, "task": "a"}  # fmt: skip
    of_model = {"a": result, "b": {**result, "task": "b"}}
    rows = [Row("tasks", name, (name,)) for name in of_model]
    table = Comparison({"dense": of_model, "wanda": of_model}, 0).table(rows)
    settings = literal_keys("harness/results", "settings_of", "adds_bos")
    return {"settings": dict.fromkeys([*settings, "lm_eval"], 0), "rows": table}


def stage_metrics() -> dict[str, dict[str, Any]]:
    """Metrics of every stage, with the keys that the stages write."""
    layer = dict.fromkeys(["method", *(field.name for field in fields(LayerReport))], 0)
    quantized = dict.fromkeys([field.name for field in fields(QuantLayerReport)], 0)
    step = dict.fromkeys(literal_keys("training/loop", "_step", "grad_norm"), 0)
    quantization = dict.fromkeys(literal_keys("stages/quantize", "run", "group_size"), 0)
    trained = literal_keys("workers/distill", "distill_on_worker", "forecast")
    trained += literal_keys("training/build", "figures_of", "tokens_per_s")
    recovery = dict.fromkeys(trained, 0)
    score = dict.fromkeys(literal_keys("workers/evaluate", "total", "kl"), 1.0)
    gate = {"num_violations": 0}
    return {
        "drop": dict.fromkeys(literal_keys("workers/drop", "write", "num_weights"), 0),
        "prune": {
            "pattern": "2:4", "method": "wanda", "layers": [layer], "gate": {"wanda": gate},
            "seconds": {"wanda": 1.0}, "phases": {"wanda": dict.fromkeys(PHASES, 0.1)},
        },
        "distill": {
            **recovery, "steps": [step], "gate": gate, "forecast": Forecast(9, 0, 0, 0.8).as_dict(),
            "goodput": {**goodput([], 0.0, 1.0), "seconds": dict.fromkeys(WORDS, 1.0)},
        },
        "evaluate": {
            "results": {"dense": score, "wanda": score, "recovered": score}, "tasks": asked_tasks(),
        },
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
        record = stage_record(metrics={**metrics, "warnings": ["one"]})
        (tmp_path / stage / RECORD).write_text(record, encoding="utf-8")
    nothing: Any = None
    one = tiny_model_dir
    made = {"prune": {"wanda": one}, "distill": {"recovered": one}, "quantize": {"packed": one}}
    models = Models(one, PIPELINE, made, "wanda")
    context = StageContext(
        Config(), Config(), tmp_path, "command", models, nothing, nothing, nothing
    )
    summary = build_summary(tmp_path, context)
    assert f"schema is {summary['schema']}" in RUN_FOLDER
    written: dict[str, list[str]] = {}
    for section, keys in sections(summary):
        assert written.setdefault(section, keys) == keys, f"rows of {section} differ in keys"
    documented = {section: sorted(keys) for section, keys in documented_keys().items()}
    assert documented == written
