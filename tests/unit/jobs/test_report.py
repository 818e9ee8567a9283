"""The report page and the terminal tables: complete, escaped, well-formed, honest about gaps."""

from __future__ import annotations

import copy
import io
import math
import random
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table

from jobs.cli.options import job_options
from jobs.reporting import units
from jobs.reporting.bars import (
    perplexity_chart,
    phase_chart,
    size_chart,
    stage_chart,
    token_chart,
)
from jobs.reporting.curves import forecast_panel, recovery_panels, thin_steps
from jobs.reporting.layer_charts import depth_chart
from jobs.reporting.layers import dead_columns, linear_kind, phase_seconds, shared_inputs
from jobs.reporting.page import render_report
from jobs.reporting.svg import Scale, element
from jobs.reporting.tables import pruning_table, results_table, speed_table, stages_table
from jobs.reporting.wording import headline
from jobs.workers.prune import layer_metrics
from sparsify.errors import InputError
from sparsify.pruning.progress import PHASES
from sparsify.training.forecast import forecast

KINDS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
METHODS = ("magnitude", "wanda", "sparsegpt")
VOID = {"meta", "link", "br", "hr", "img", "input", "col"}
OPTIONAL_SECTIONS = (
    "run",
    "results",
    "stages",
    "layers",
    "pruning",
    "recovery",
    "quantization",
    "speed",
    "warnings",
)
SECTIONS = [
    "results",
    "writing",
    "recovery",
    "layers",
    "kept",
    "calibration",
    "sparsity",
    "size",
    "speed",
    "time",
    "phases",
    "run",
]
NEW_FIGURES = ("tokens_per_column", "condition", "large_kept", "seconds")  # fmt: skip
HOSTILE = "</title><script>alert('x')</script><img src=x onerror=\"y\">&amp;{{ 7 * 7 }}[red]"


def make_result(name: str, perplexity: float | None, **more: Any) -> dict[str, Any]:
    values = {
        "label": name, "kl": 0.25, "top1_agreement": 0.75, "log_gap_recovered": None,
        "disk_bytes": 3_345_408, "packed_bytes": None, "violations": 0,
        "writing": {
            "prompt": "def main(", "text": f"argv):  # {name} <b>\n    pass", "num_tokens": 48,
            "temperature": 0.7, "seed": 3,
        },
    }  # fmt: skip
    return {"name": name, "perplexity": perplexity, **values, **more}


def make_summary(num_blocks: int = 4, num_steps: int = 250) -> dict[str, Any]:
    generator = random.Random(0)
    gap = 1 - math.log(8.6 / 7.1) / math.log(13 / 7.1)
    names = [f"model.layers.{b}.{kind}" for b in range(num_blocks) for kind in KINDS]
    return {
        "schema": 1,
        "run": {
            "name": "toy-run", "dir": "runs/toy-run", "command": "twofour model.path=toy",
            "model": "toy", "num_parameters": 836_352, "pattern": "2:4", "method": "sparsegpt",
            "seed": 3, "cluster": "local", "num_workers": 2, "device": "cpu",
            "versions": {"torch": "2.13.0"}, "duration_s": 402.3,
        },
        "results": [
            make_result("dense", 7.1, violations=None, kl=0.0, top1_agreement=1.0),
            make_result("magnitude", 31.07, kl=1.482),
            make_result("wanda", 19.26, kl=0.9813),
            make_result("sparsegpt", 13.0, kl=0.6048),
            make_result("recovered", 8.6, log_gap_recovered=gap, packed_bytes=2_011_904),
            make_result("recovered_int4", 8.83, disk_bytes=631_240, packed_bytes=631_240),
        ],
        "stages": [
            {"name": "prune", "status": "reused", "duration_s": 21.4},
            {"name": "distill", "status": "ran", "duration_s": 301.9},
            {"name": "evaluate", "status": "ran", "duration_s": 48.2},
        ],
        "layers": [
            {
                "method": method, "name": name, "block": int(name.split(".")[2]),
                "shape": [128, 256], "num_tokens": 32_768, "error": 7.0,
                "relative_error": generator.uniform(0.01, 0.9), "sparsity": 0.5, "damping": 0.01,
                "num_dead_columns": 0, "tokens_per_column": 128.0,
                "condition": generator.uniform(1e3, 1e5) if method == "sparsegpt" else None,
                "large_kept": generator.uniform(0.9, 1), "keep_mask_sha256": "0" * 64,
                "seconds": dict.fromkeys(PHASES, 0.125),
            }
            for method in METHODS for name in names
        ],
        "pruning": [
            {
                "method": method, "duration_s": 1.5 * len(names),
                "seconds": dict.fromkeys(PHASES, 0.125 * len(names)),
            }
            for method in METHODS
        ],
        "recovery": {
            "num_tokens": num_steps * 4096,
            "tokens_per_s": 3391.7,
            "steps": [
                {
                    "step": step, "num_tokens": step * 4096, "loss": 0.1 + 1 / step,
                    "kl": 0.1 + 1 / step, "ce": None, "square_head": None,
                    "learning_rate": 1e-3 / step, "grad_norm": generator.uniform(0.2, 2),
                }
                for step in range(1, num_steps + 1)
            ],
        },
        "quantization": {
            "method": "gptq", "scheme": "int4", "group_size": 128,
            "layers": [
                {"name": name, "block": int(name.split(".")[2]), "relative_error": 0.006}
                for name in names
            ],
        },
        "speed": {
            "dtype": "float32", "device": "cpu", "num_threads": 1,
            "models": [
                {"name": "dense", "num_bytes": 3_345_408, "first_token_s": 0.02, "token_s": 0.004},
                {
                    "name": "int4-packed", "num_bytes": 631_240, "first_token_s": 0.03,
                    "token_s": 0.005,
                },
            ],
            "layer": {
                "rows": 14336, "columns": 4096,
                "sides": [
                    {"name": "dense float32", "num_bytes": 234_881_024, "median_s": 0.02},
                    {"name": "dense bfloat16", "num_bytes": 117_440_512, "median_s": 0.0125},
                    {"name": "2:4 INT4", "num_bytes": 22_937_600, "median_s": 0.0025},
                ],
            },
        },
        "warnings": ["calibration: only 96 rows"],
    }  # fmt: skip


def without_new_figures(summary: dict[str, Any]) -> dict[str, Any]:
    """The same run as earlier versions recorded it."""
    old = {key: value for key, value in summary.items() if key != "pruning"}
    old["layers"] = [
        {key: value for key, value in layer.items() if key not in NEW_FIGURES}
        for layer in summary["layers"]
    ]
    return old


class Page(HTMLParser):
    """Fails on unbalanced tags and repeated ids; keeps tags, attribute values and text."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.ids: list[str] = []
        self.parts: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == [], f"never closed: {self.open}"
        assert len(self.ids) == len(set(self.ids))
        self.text = re.sub(r"\s+", " ", " ".join(self.parts))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> repeats an attribute"
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        raise AssertionError(f"self-closed <{tag}>")

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> inside <{self.open[-1]}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.parts.append(data)


def parse(summary: dict[str, Any]) -> Page:
    page = Page(render_report(summary))
    assert "nan" not in {value for _, name, value in page.attributes if name in ("x", "y", "width")}
    return page


def printed(table: Table, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None, legacy_windows=False)
    console.print(table)
    output = console.file
    assert isinstance(output, io.StringIO)
    return output.getvalue()


def test_complete_page_holds_every_section_and_number() -> None:
    summary = make_summary()
    page = parse(summary)
    assert page.ids == SECTIONS
    for row in summary["results"]:
        for text in (
            row["label"],
            units.perplexity(row["perplexity"]),
            units.significant(row["kl"]),
            units.percent(row["top1_agreement"]),
            units.percent(row["log_gap_recovered"]),
            units.size(row["disk_bytes"]),
            units.size(row["packed_bytes"]),
        ):
            assert text in page.text
    for text in ("calibration: only 96 rows", "1,024,000 tokens", "3,392 tokens/s", "torch 2.13.0",
                 "twofour model.path=toy", "5 min 02 s", "836,352", "GPTQ INT4"):  # fmt: skip
        assert text in page.text
    for layer in summary["layers"]:
        assert f"{layer['name']}: {units.significant(layer['relative_error'], 2)}" in page.text


@pytest.mark.parametrize("empty", ["absent", "null", "empty"])
@pytest.mark.parametrize("section", OPTIONAL_SECTIONS)
def test_page_without_one_section(section: str, empty: str) -> None:
    summary = make_summary()
    if empty == "absent":
        del summary[section]
    else:
        summary[section] = None if empty == "null" else type(summary[section])()
    page = parse(summary)
    gone = {
        "results": {"results", "writing", "size"}, "speed": {"speed"}, "stages": {"time"},
        "recovery": {"recovery"},
        "layers": {"sparsity", "kept", "calibration"},
    }.get(section, set())  # fmt: skip
    assert page.ids == [name for name in SECTIONS if name not in gone]
    named = {"results": "evaluation", "layers": "pruning", "recovery": "recovery training",
             "quantization": "quantization"}  # fmt: skip
    if section in named:
        assert re.search(rf"Not part of this run: .*{named[section]}", page.text)
    else:
        assert "Not part of this run" not in page.text


def test_texts_and_speed_are_on_the_page() -> None:
    summary = make_summary()
    page = parse(summary)
    assert "sampled at temperature 0.7 with seed 3, at most 48 tokens." in page.text
    for name in ("dense", "sparsegpt", "recovered", "recovered_int4"):
        assert f"def main( argv): # {name} <b> pass" in page.text
    assert "# wanda <b>" not in page.text, "of one-shot models the main one writes"
    assert "The model has 836 k parameters" in page.text
    for text in ("250 tokens/s", "200 tokens/s 0.80× dense", "1 thread, float32",
                 "14,336 × 4,096", "2.50 ms 5.00× dense", "12.5 ms 1.00× dense"):  # fmt: skip
        assert text in page.text, text


def test_texts_written_in_different_ways_say_so_each() -> None:
    summary = make_summary()
    summary["results"][0]["writing"]["temperature"] = 0.0
    summary["run"]["num_parameters"] = 8e9
    text = parse(summary).text
    assert "dense the likeliest token each time, at most 48 tokens" in text
    assert "recovered sampled at temperature 0.7 with seed 3, at most 48 tokens" in text
    assert "no meaning" not in text


def test_speed_of_a_large_model_needs_no_excuse() -> None:
    summary = make_summary()
    summary["speed"]["models"][0]["num_bytes"] = 16e9
    assert "A small model" in parse(make_summary()).text
    assert "A small model" not in parse(summary).text


def test_terminal_speed() -> None:
    speed = make_summary()["speed"]
    for width in (60, 80):
        text = printed(speed_table(speed), width)
        assert max(map(len, text.splitlines())) <= width
        assert re.search(r"2:4 INT4 +631 kB +30.0 ms +200 +0.80×", text)
        assert re.search(r"2:4 INT4 +22.9 MB +2.50 ms +5.00×", text)
        assert "batch 1, 1 thread, float32" in text
    speed["models"][1]["token_s"] = None
    assert units.MISSING in printed(speed_table(speed))


def test_page_of_prune_and_evaluate_only() -> None:
    summary = make_summary()
    summary |= {"recovery": None, "quantization": None, "results": summary["results"][:4]}
    page = parse(summary)
    assert "sparsegpt at 2:4: perplexity 13.00, 1.83× dense".lower() in page.text.lower()
    assert "Not part of this run: recovery training, quantization, packed files." in page.text
    assert "Packed size" not in page.text, "a column without values has no place in the table"
    assert "won back" not in page.text, "a key explains only colours that are there"


def test_bare_summary_gives_a_page() -> None:
    page = parse({"schema": 1})
    assert "nothing measured yet" in page.text
    assert page.ids == ["run"]


@pytest.mark.parametrize("schema", [None, 0, 2, "1"])
def test_other_schema_is_refused(schema: object) -> None:
    with pytest.raises(InputError, match=r"summary\.json: schema .* reads schema 1"):
        render_report({"schema": schema})


def replace_texts(value: Any, text: str) -> Any:
    """`value` with `text` in place of every string but the pattern."""
    if isinstance(value, dict):
        kept = {"pattern"}
        return {k: v if k in kept else replace_texts(v, text) for k, v in value.items()}
    if isinstance(value, list):
        return [replace_texts(item, text) for item in value]
    return text if isinstance(value, str) else value


def test_hostile_names_stay_text() -> None:
    summary = replace_texts(make_summary(num_blocks=1, num_steps=3), HOSTILE)
    summary["run"]["versions"] = {HOSTILE: HOSTILE}
    summary["run"]["pattern"] = HOSTILE
    page = parse(summary)
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert page.text.count(HOSTILE) > 10
    assert "49" not in headline(summary)[0][0], "text is never a template"


def test_characters_no_file_may_hold_are_replaced() -> None:
    summary = make_summary(num_blocks=1, num_steps=1)
    summary["run"]["name"] = "a\x00b\ud800c\x1bd"
    page = render_report(summary)
    page.encode("utf-8")
    assert "a\ufffdb\ufffdc\ufffdd" in page


def test_page_needs_nothing_else_and_is_reproducible() -> None:
    summary = make_summary()
    before = copy.deepcopy(summary)
    source = render_report(summary)
    assert summary == before, "rendering leaves the summary alone"
    assert source == render_report(before)
    page = Page(source)
    assert not {"script", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    addresses = [v for _, name, v in page.attributes if name in ("src", "href", "srcset", "action")]
    assert all(address and address.startswith("data:") for address in addresses)
    assert not re.search(r"url\(|@import|@font-face", source)
    policy = [v for _, name, v in page.attributes if name == "content" and v and "default-src" in v]
    assert len(policy) == 1
    assert "default-src 'none'" in policy[0]
    assert "prefers-color-scheme: dark" in source
    assert any(value == "viewport" for _, _, value in page.attributes)


@pytest.mark.parametrize(("num_blocks", "num_steps"), [(1, 1), (1, 20), (80, 20_000)])
def test_small_and_large_runs(num_blocks: int, num_steps: int) -> None:
    summary = make_summary(num_blocks, num_steps)
    source = render_report(summary)
    assert len(source.encode()) < 1_000_000  # the largest of these takes 0.70 MB
    text = Page(source).text
    assert f"model.layers.{num_blocks - 1}.mlp.down_proj" in text
    assert f"{num_steps * 4096:,} tokens" in text


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf, 0.0, -1.0])
def test_unusable_figures_are_shown_not_drawn(value: float | None) -> None:
    summary = make_summary(num_blocks=1, num_steps=30)
    summary["results"][4] = make_result("recovered", value, kl=value, log_gap_recovered=value)
    summary["layers"][0]["relative_error"] = value
    summary["layers"][1]["sparsity"] = value
    summary["stages"][0]["duration_s"] = value
    for key in ("loss", "learning_rate", "grad_norm"):
        summary["recovery"]["steps"][7][key] = value
    page = parse(summary)
    bad = re.compile(r"nan|inf|none", re.IGNORECASE)
    drawn = {"x", "y", "y1", "y2", "width", "height", "points", "fill-opacity"}
    assert not [a for a in page.attributes if a[1] in drawn and bad.search(a[2] or "")]
    styles = [v for _, name, v in page.attributes if name == "style"]
    assert not [style for style in styles if bad.search(style or "")]
    assert f"recovered: perplexity is {units.perplexity(value)}, which is no usable" in page.text


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_nothing_finite_at_all(value: float | None) -> None:
    def blank(item: Any) -> Any:
        if isinstance(item, dict):
            kept = ("schema", "block", "step", "bits")
            return {k: v if k in kept else blank(v) for k, v in item.items()}
        if isinstance(item, list):
            return [blank(part) for part in item]
        return value if isinstance(item, (int, float)) else item

    page = parse(blank(make_summary(num_blocks=2, num_steps=5)))
    assert "results" in page.ids
    assert "the loss is not finite at 5 steps" in page.text


def test_violations_and_lost_layers_are_warned_of() -> None:
    summary = make_summary(num_blocks=1, num_steps=3)
    summary["warnings"] = [f"warning number {i}" for i in range(9)]
    summary["results"][4]["violations"] = 1234
    summary["layers"][0]["relative_error"] = math.nan
    text = parse(summary).text
    assert "recovered: 1,234 violations of 2:4" in text
    assert "No finite reconstruction error in model.layers.0.self_attn.q_proj." in text
    assert "11 warnings" in text
    assert "warning number 8" in text, "a long list is folded, not cut"
    assert "holds 2:4 exactly" not in text


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "Recovered 68 % of the perplexity gap at 2:4, INT4 file 5.3× smaller"),
        ({"pattern": "unstructured:0.5"},
         ("Recovered 68 % of the perplexity gap at 50 % unstructured sparsity, "
          "INT4 file 5.3× smaller")),
        ({"gap": -0.2}, "Recovery widened the perplexity gap at 2:4, INT4 file 5.3× smaller"),
        ({"gap": None}, "Recovered at 2:4: perplexity 8.60, 1.21× dense, INT4 file 5.3× smaller"),
        ({"keep": ["dense"]}, "Dense model: perplexity 7.10"),
        ({"keep": ["sparsegpt"]}, "Sparsegpt at 2:4: perplexity 13.00"),
        ({"keep": ["dense", "wanda"]}, "Wanda at 2:4: perplexity 19.26, 2.71× dense"),
        ({"keep": ["recovered"]}, "Recovered 68 % of the perplexity gap at 2:4"),
        ({"keep": []}, "Pruned 28 layers at 2:4, nothing measured yet"),
        ({"tuned": True},
         "Fine-tuned at 2:4: perplexity 8.20, 1.15× dense, INT4 file 5.3× smaller"),
    ],
)  # fmt: skip
def test_headline(change: dict[str, Any], expected: str) -> None:
    summary = make_summary()
    summary["run"]["pattern"] = change.get("pattern", "2:4")
    if "gap" in change:
        summary["results"][4]["log_gap_recovered"] = change["gap"]
    if "tuned" in change:
        summary["results"].insert(5, make_result("finetuned", 8.2, label="fine-tuned"))
    if "keep" in change:
        summary["results"] = [r for r in summary["results"] if r["name"] in change["keep"]]
    assert "".join(text for text, _ in headline(summary)) == expected
    assert expected in Page(render_report(summary)).text, "the title"


def test_perplexity_bars_are_log_gaps() -> None:
    results = make_summary()["results"]
    chart = perplexity_chart(results, "sparsegpt")
    assert chart is not None
    dense, _, _, one_shot, recovered, _ = chart.rows
    (lost,) = one_shot.tracks[0]
    remaining, regained = recovered.tracks[0]
    assert chart.reference is not None
    assert dense.dot == pytest.approx(chart.reference[0])
    assert lost.start == pytest.approx(chart.reference[0])
    assert remaining.length + regained.length == pytest.approx(lost.length)
    share = results[4]["log_gap_recovered"]
    assert regained.length / lost.length == pytest.approx(share), "blue is the share recovered"
    assert [row.tracks[0][0].tone for row in chart.rows[1:4]] == ["baseline", "baseline", "loss"]


def test_perplexity_better_than_dense_and_without_dense() -> None:
    better = perplexity_chart(
        [make_result("dense", 7.0), make_result("sparsegpt", 9.0), make_result("recovered", 6.0)],
        "sparsegpt",
    )
    assert better is not None
    assert better.reference is not None
    (gain,) = better.rows[2].tracks[0]
    assert gain.tone == "gain"
    assert gain.start + gain.length == pytest.approx(better.reference[0])
    alone = perplexity_chart([make_result("sparsegpt", 9.0), make_result("wanda", 11.0)], None)
    assert alone is not None
    assert alone.reference is None
    assert all(row.tracks == [[]] and row.dot is not None for row in alone.rows)
    assert perplexity_chart([make_result("dense", math.nan)], None) is None


def test_sizes_share_a_row_when_equal_and_stages_are_measured_against_the_longest() -> None:
    chart = size_chart(make_summary()["results"])
    assert chart is not None
    assert [row.label for row in chart.rows] == [
        "dense, magnitude, wanda, sparsegpt", "recovered", "recovered_int4",
    ]  # fmt: skip
    assert [len(row.tracks) for row in chart.rows] == [1, 2, 1]
    assert chart.rows[2].tracks[0][0].length == pytest.approx(631_240 / 3_345_408)
    assert chart.rows[2].note == "5.30× smaller"
    stages = stage_chart(make_summary()["stages"])
    assert stages is not None
    assert [row.tracks[0][0].tone for row in stages.rows] == ["reused", "time", "time"]
    assert stages.rows[2].tracks[0][0].length == pytest.approx(48.2 / 301.9)


def test_thinned_steps_are_means_that_keep_gaps() -> None:
    steps = [{"step": i, "num_tokens": 10 * i, "loss": float(i), "ce": None} for i in range(1, 11)]
    steps[5]["loss"] = math.nan
    thinned = thin_steps(steps, most=5)
    assert [step["step"] for step in thinned] == [2, 4, 6, 8, 10]
    assert [step["loss"] for step in thinned] == [1.5, 3.5, None, 7.5, 9.5]
    assert thinned[0]["num_tokens"] == 20
    assert thin_steps(steps, most=10) == steps


def test_recovery_parts_get_their_own_curves_and_gaps_break_a_curve() -> None:
    recovery = make_summary()["recovery"]
    captions = [panel.caption for panel in recovery_panels(recovery)]
    assert [caption.split(",")[0].split(" (")[0] for caption in captions] == [
        "Loss: KL to the dense model", "Learning rate", "Gradient norm",
    ]  # fmt: skip
    for step in recovery["steps"]:
        step["ce"] = 2.0
    captions = [panel.caption for panel in recovery_panels(recovery)]
    assert [caption.split(",")[0] for caption in captions][:3] == [
        "Loss", "KL to the dense model", "Cross-entropy",
    ]  # fmt: skip
    few = {"steps": recovery["steps"][:10]}
    assert recovery_panels(few)[0].svg.count("<polyline") == 1
    few["steps"][4]["loss"] = math.nan
    assert recovery_panels(few)[0].svg.count("<polyline") == 2


@pytest.mark.parametrize(
    ("name", "block", "expected"),
    [
        ("model.layers.3.self_attn.q_proj", 3, "self_attn.q_proj"),
        ("model.layers.1.mlp.experts.7.up_proj", 1, "mlp.experts.*.up_proj"),
        ("transformer.h.0.fc1", 0, "fc1"),
        ("odd", 2, "odd"),
    ],
)
def test_linear_kind(name: str, block: int, expected: str) -> None:
    assert linear_kind(name, block) == expected


def test_experts_share_a_cell_that_shows_the_worst() -> None:
    summary = make_summary(num_blocks=1, num_steps=1)
    summary["quantization"] = None
    base = summary["layers"][0] | {"method": "sparsegpt"}
    summary["layers"] = [
        base | {"name": f"m.layers.0.experts.{i}.up", "relative_error": 0.1 * (i + 1)}
        for i in range(4)
    ]
    text = parse(summary).text
    assert "m.layers.0.experts.3.up: 0.40" in text
    assert "m.layers.0.experts.0.up: 0.10" not in text


# --- pruning, layer by layer


def layer_of(summary: dict[str, Any], method: str, block: int, kind: str) -> dict[str, Any]:
    name = f"model.layers.{block}.{kind}"
    return next(r for r in summary["layers"] if (r["method"], r["name"]) == (method, name))


def test_every_figure_of_the_worst_layers_is_in_the_table() -> None:
    summary = make_summary()
    worst = layer_of(summary, "sparsegpt", 2, "mlp.up_proj")
    worst |= {
        "relative_error": 0.987, "error": 43.21, "large_kept": 0.9123, "sparsity": 0.4567,
        "damping": 0.0777, "condition": 65_432.0, "num_dead_columns": 17, "num_tokens": 54_321,
        "tokens_per_column": 212.0, "seconds": {"solve": 40.0, "factor": 2.5},
    }  # fmt: skip
    page = parse(summary)
    row = (
        "model.layers.2.mlp.up_proj 128 × 256 0.987 43.2 91.2 % 45.7 % 0.0777 65,000 17 54,321 "
        "212 42.5 s"
    )
    assert row in page.text
    assert "The 10 layers with the largest error under sparsegpt" in page.text
    assert "median of each block’s layers; shaded: smallest to largest under sparsegpt" in page.text
    assert "The same map for magnitude, wanda" in page.text


def test_page_of_an_old_run_leaves_out_what_it_lacks() -> None:
    page = parse(without_new_figures(make_summary()))
    gone = {"kept", "calibration", "phases"}
    assert page.ids == [name for name in SECTIONS if name not in gone]
    assert "Relative error over depth" in page.text
    for heading in ("Condition", "Tokens per", "Large kept", "Time of pruning"):
        assert heading not in page.text


@pytest.mark.parametrize(
    ("figure", "gone"),
    [
        ("tokens_per_column", "Tokens per input column"), ("condition", "Condition over depth"),
        ("large_kept", "Share of large weights kept over depth"),
    ],
)  # fmt: skip
def test_one_missing_figure_leaves_out_one_plot(figure: str, gone: str) -> None:
    summary = make_summary()
    assert gone in parse(summary).text
    for layer in summary["layers"]:
        del layer[figure]
    page = parse(summary)
    assert gone not in page.text
    assert "Relative error over depth" in page.text


def test_damping_is_a_sentence_until_some_of_it_was_raised() -> None:
    summary = make_summary()
    page = parse(summary)
    assert "Damping: 0.0100 in every layer, under sparsegpt." in page.text
    assert "Damping over depth" not in page.text
    layer_of(summary, "sparsegpt", 1, "mlp.down_proj")["damping"] = 0.1
    page = parse(summary)
    assert "Damping over depth" in page.text
    assert (
        "sparsegpt: the Hessian needed more damping than was asked for, up to 0.10, in "
        "model.layers.1.mlp.down_proj." in page.text
    )


def test_layers_to_be_warned_of() -> None:
    summary = make_summary()
    assert "1 warning " in parse(summary).text, "that of the record"
    layer_of(summary, "sparsegpt", 0, "mlp.up_proj")["relative_error"] = 1.01
    layer_of(summary, "sparsegpt", 1, "mlp.up_proj")["condition"] = 3.2e6
    layer_of(summary, "wanda", 1, "mlp.up_proj")["relative_error"] = 5.0  # a baseline: no warning
    text = parse(summary).text
    for warning in (
        "sparsegpt: the relative error is above 1 in model.layers.0.mlp.up_proj, which is worse",
        "sparsegpt: condition 3,200,000 in model.layers.1.mlp.up_proj, too much for float32; "
        "raise prune.damping.",
    ):
        assert warning in text
    assert "3 warnings" in text
    assert "shaded: too much for float32" in text


def test_dead_columns_are_named_once_and_folded_when_many() -> None:
    summary = make_summary()
    for method in ("wanda", "sparsegpt"):
        layer_of(summary, method, 1, "mlp.down_proj")["num_dead_columns"] = 3
    layer_of(summary, "sparsegpt", 2, "mlp.down_proj")["num_dead_columns"] = 5
    rows = [("model.layers.2.mlp.down_proj", 5, 256), ("model.layers.1.mlp.down_proj", 3, 256)]
    assert dead_columns(summary["layers"]) == rows
    text = parse(summary).text
    assert "model.layers.2.mlp.down_proj: 5 of 256; model.layers.1.mlp.down_proj: 3 of 256." in text
    for layer in summary["layers"]:
        layer["num_dead_columns"] = 1
    text = parse(summary).text
    assert "and 20 more layers." in text
    assert "All 28 layers with dead columns" in text
    assert "calibration" in parse(without_new_figures(summary)).ids


def test_phases_lie_end_to_end_and_the_rest_of_the_time_has_a_place() -> None:
    summary = make_summary()
    seconds = phase_seconds(summary["pruning"], summary["layers"])
    assert seconds["wanda"] == dict.fromkeys(PHASES, 3.5) | {"other": 14.0}
    seconds["sparsegpt"] = {"solve": 60.0, "statistics": 20.0, "unheard-of": 4.0}
    chart = phase_chart(seconds, summary["results"], "sparsegpt")
    assert chart is not None
    bar = chart.rows[2]
    (spans,) = bar.tracks
    assert [span.tone for span in spans] == ["phase-statistics", "phase-solve", "phase-other"]
    assert spans[0].length == pytest.approx(20 / 84)
    assert spans[1].start == pytest.approx(20 / 84)
    assert spans[2].start + spans[2].length == pytest.approx(1)
    assert (bar.value, bar.note, bar.is_main) == ("1 min 24 s", "perplexity 13.00", True)
    assert "solve 1 min 00 s (71%)" in bar.title
    text = parse(summary).text
    assert "42.0 s perplexity 13.00" in text
    for words in ("calibration statistics", "factor Hessians", "all the rest"):
        assert words in text


def test_phases_come_from_the_layers_where_the_whole_has_none() -> None:
    summary = make_summary()
    assert phase_seconds([], summary["layers"])["wanda"] == dict.fromkeys(PHASES, 3.5)
    bare = [{"method": "wanda", "duration_s": 2.0, "seconds": {}}]
    assert phase_seconds(bare, []) == {"wanda": {"other": 2.0}}
    none = [{"method": "wanda", "duration_s": None, "seconds": {"solve": math.nan}}]
    assert phase_seconds(none, []) == {}


def test_kinds_with_the_same_figures_share_an_input() -> None:
    summary = make_summary()
    layers = [layer for layer in summary["layers"] if layer["method"] == "sparsegpt"]
    for layer in layers:
        kind = linear_kind(layer["name"], layer["block"])
        layer["condition"] = {"q_proj": 1.0, "k_proj": 1.0, "v_proj": 1.0}.get(kind[-6:], len(kind))
    groups = shared_inputs(layers, "condition")
    assert list(groups) == ["q_proj, k_proj, v_proj", "o_proj", "gate_proj, down_proj", "up_proj"]
    assert [layer["block"] for layer in groups["o_proj"]] == [0, 1, 2, 3]
    assert shared_inputs(layers, "no such key") == {}


def test_tokens_per_column_have_one_row_per_input_and_a_limit() -> None:
    layers = make_summary()["layers"][:28]
    for layer in layers:
        if layer["name"].endswith("down_proj"):
            layer |= {"tokens_per_column": 12.5 + layer["block"], "shape": [128, 512]}
    chart = token_chart(layers)
    assert chart is not None
    wide, narrow = chart.rows
    assert wide.label == "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj"
    assert (narrow.label, narrow.value, narrow.note) == ("down_proj", "12.5", "512 columns")
    assert (wide.is_main, narrow.is_main) == (False, True), "what is too few stands out"
    (few, spread) = narrow.tracks[0]
    assert few.tone == "few"
    assert narrow.dot is not None
    assert wide.dot is not None
    assert narrow.dot == spread.start < few.length < wide.dot
    assert narrow.title.endswith("up to 15.5")


def test_depth_curves_are_medians_broken_where_a_block_has_none() -> None:
    layers = [
        {"name": f"m.layers.{block}.{kind}", "block": block, "value": value}
        for block, values in enumerate([(1, 2, 9), (2, 3, 4), (None, 0, math.nan), (5, 5, 5)])
        for kind, value in zip("abc", values, strict=True)
    ]
    chart = depth_chart("test", {"one": layers}, "value", units.significant, main="one")
    assert chart is not None
    lines = re.findall(r'<polyline[^>]*points="([^"]*)"', chart.svg)
    points = [[tuple(map(float, p.split(","))) for p in line.split()] for line in lines]
    assert [[x for x, _ in line] for line in points] == [[125, 375], [812.5, 937.5]]
    scale = Scale.over([1, 9], is_log=True, pad=0.07)
    heights = [y for line in points for _, y in line]
    assert heights == pytest.approx([1000 * (1 - scale(v)) for v in (2, 3, 5, 5)], abs=0.01)
    assert chart.svg.count("<polygon") == 2
    assert chart.legend == [
        ("t0", "one", "median 3.50, largest 9.00 in block 0 c; 2 of 12 not finite or missing")
    ]
    assert "block 1\none: median 3.00, largest 4.00 in block 1 c" in chart.svg
    assert not chart.has_band
    empty = depth_chart("test", {"one": layers[6:9]}, "value", units.significant)
    assert empty is None, "zero has no place on a logarithmic axis"
    linear = depth_chart("test", {"one": layers}, "value", units.significant, is_share=True)
    assert linear is not None
    assert linear.svg.count("<polyline") == 1


@pytest.mark.parametrize(
    ("values", "has_band"), [([1e3, 1e5], False), ([1e3, 1e7], True), ([1e8, 1e9], True)]
)
def test_the_range_to_be_warned_of_is_drawn_as_far_as_it_is_in_sight(
    values: list[float], has_band: bool
) -> None:
    layers = [{"name": f"m.{i}.up", "block": i, "value": v} for i, v in enumerate(values)]
    chart = depth_chart(
        "test", {"up": layers}, "value", units.significant, warn_above=1e6
    )  # fmt: skip
    assert chart is not None
    assert chart.has_band is has_band
    band = re.search(r'class="band" points="([^"]*)"', chart.svg)
    assert (band is not None) is has_band
    if band is not None:
        top, *_, bottom = sorted(float(point.split(",")[1]) for point in band[1].split())
        assert top == 0, "it starts at the top"
        assert 0 < bottom <= 1000


@pytest.mark.parametrize("value", [None, 0.0, math.nan, math.inf, -1.0, 1e300, 1e-300])
def test_unusable_figures_of_layers_are_never_drawn(value: float | None) -> None:
    summary = make_summary(num_blocks=2, num_steps=1)
    for layer in summary["layers"]:
        if layer["block"] == 1 or layer["method"] == "wanda":
            layer |= dict.fromkeys(("relative_error", *NEW_FIGURES[:3], "damping"), value)
            layer["seconds"] = dict.fromkeys(PHASES, value)
    summary["pruning"][0] |= {"duration_s": value, "seconds": {"solve": value}}
    page = parse(summary)
    bad = re.compile(r"nan|inf|none", re.IGNORECASE)
    drawn = {"x", "y", "y1", "y2", "width", "height", "points", "fill-opacity", "style"}
    assert not [a for a in page.attributes if a[1] in drawn and bad.search(a[2] or "")]
    assert set(page.ids) == set(SECTIONS)


def test_methods_beyond_the_colours_share_them() -> None:
    layers = [{"name": "m.0.up", "block": 0, "value": 1.0}]
    series = {f"method{i}": layers for i in range(12)}
    chart = depth_chart("test", series, "value", units.significant, main="method3")
    assert chart is not None
    assert [tone for tone, _, _ in chart.legend][:5] == ["t1", "t2", "t3", "t0", "t4"]
    style = render_report(make_summary(num_blocks=1, num_steps=1)).split("</style>")[0]
    assert all(f"svg .{tone} {{" in style for tone, _, _ in chart.legend)
    assert all(f".phase-{phase} {{" in style for phase in (*PHASES, "other"))


def test_advice_names_options_that_exist() -> None:
    summary = make_summary()
    summary["layers"][-1] |= {"damping": 0.5, "condition": 1e9, "tokens_per_column": 1.0}
    named = set(re.findall(r"\b(?:prune|data|distill|run)\.[a-z_]+\b", parse(summary).text))
    assert {"prune.num_samples", "prune.damping", "prune.skip", "prune.method"} <= named
    assert named <= set(job_options("prune"))


def test_metrics_of_a_layer_are_flat_and_leave_out_what_is_unknown() -> None:
    report = make_summary()["layers"][-1] | {"condition": None, "damping": None}
    report |= {"seconds": {"solve": 2, "factor": 0.5}, "relative_error": 0.25, "large_kept": 1}
    metrics = layer_metrics(report, "sparsegpt")
    assert metrics == {
        "prune/sparsegpt/relative_error": 0.25,
        "prune/sparsegpt/sparsity": 0.5,
        "prune/sparsegpt/num_dead_columns": 0.0,
        "prune/sparsegpt/tokens_per_column": 128.0,
        "prune/sparsegpt/large_kept": 1.0,
        "prune/sparsegpt/seconds/solve": 2.0,
        "prune/sparsegpt/seconds/factor": 0.5,
    }
    assert all(type(value) is float for value in metrics.values())


def test_terminal_pruning_fits_80_columns() -> None:
    summary = make_summary()
    for layer in summary["layers"]:
        layer["method"] = {"wanda": "a_method_of_long_name"}.get(layer["method"], layer["method"])
    summary["pruning"][1] |= {"method": "a_method_of_long_name", "duration_s": 45_296.0}
    worst = layer_of(summary, "sparsegpt", 3, "mlp.down_proj")
    worst["relative_error"] = 0.95
    text = printed(pruning_table(summary))
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "…" not in text
    rows = {line.split()[0]: line for line in text.splitlines() if line.split()}
    assert "12 h 35 min" in rows["a_method_of_long_name"]
    for value in ("42.0 s", "0.950", "3 down_proj"):
        assert value in rows["sparsegpt"]
    kept = [r["large_kept"] for r in summary["layers"] if r["method"] == "sparsegpt"]
    assert units.percent(sum(kept) / 28) in rows["sparsegpt"]


def test_terminal_pruning_of_an_old_run() -> None:
    text = printed(pruning_table(without_new_figures(make_summary())))
    assert "Time" not in text
    assert "Large weights" not in text
    assert "Largest" in text


positive = st.floats(min_value=1e-100, max_value=1e100)


@settings(max_examples=60, deadline=None)
@given(st.lists(positive, min_size=1, max_size=5), st.booleans())
def test_scale_holds_its_values_and_few_ticks(values: list[float], is_log: bool) -> None:
    scale = Scale.over(values, is_log=is_log)
    places = [scale(value) for value in values]
    assert all(-1e-6 <= place <= 1 + 1e-6 for place in places)
    ticks = scale.ticks(6)
    assert len(ticks) <= 7
    assert all(-1e-6 <= scale(tick) <= 1 + 1e-6 for tick in ticks)


@settings(max_examples=25, deadline=None, phases=[Phase.explicit, Phase.generate])
@example([None, math.nan, 1.795e308, 5e-324, -0.0, 10**30], "\u202e<")
@given(
    st.lists(
        st.one_of(st.none(), st.floats(), st.integers(min_value=0)), min_size=6, max_size=6
    ),
    st.text(max_size=12),
)  # fmt: skip
def test_any_figures_and_names_give_a_page(values: list[Any], text: str) -> None:
    summary = make_summary(num_blocks=1, num_steps=4)
    for row, value in zip(summary["results"], values, strict=True):
        row |= {"perplexity": value, "log_gap_recovered": value, "packed_bytes": value}
        row["label"] = text
    for step, value in zip(summary["recovery"]["steps"], values[:4], strict=True):
        step |= {"loss": value, "kl": value, "grad_norm": value}
    summary["layers"][0]["relative_error"] = values[0]
    summary["run"]["name"] = text
    Page(render_report(summary)).text.encode()
    printed(results_table(summary))


def test_element_escapes_text_and_attributes() -> None:
    assert element("text", '<&"', aria_label='a"<b', x=1.50) == (
        '<text aria-label="a&#34;&lt;b" x="1.5">&lt;&amp;&#34;</text>'
    )


@pytest.mark.parametrize(
    ("spell", "value", "expected"),
    [
        (units.perplexity, 7.1, "7.10"), (units.perplexity, 123.45, "123.5"),
        (units.perplexity, 12345.6, "12,346"), (units.perplexity, 4.8e7, "4.8e7"),
        (units.perplexity, math.nan, "NaN"), (units.perplexity, None, "–"),
        (units.percent, 0.683, "68.3 %"), (units.percent, -0.00001, "0.0 %"),
        (units.percent, -0.25, "-25.0 %"),
        (units.ratio, 1.831, "1.83×"), (units.ratio, 1234.0, "1,234×"),
        (units.significant, 0.04151, "0.0415"), (units.significant, 9.999, "10.0"),
        (units.significant, 2.1e-5, "2.10e-5"), (units.significant, math.inf, "∞"),
        (units.size, 512, "512 B"), (units.size, 999_600, "1.00 MB"),
        (units.size, 141_000_000_000, "141 GB"), (units.size, 3_345_408, "3.35 MB"),
        (units.large_count, 836_352, "836 k"), (units.large_count, 7, "7"),
        (units.count, 1_234_567, "1,234,567"),
        (units.duration, 0.42, "0.42 s"), (units.duration, 59.96, "1 min 00 s"),
        (units.duration, 192.4, "3 min 12 s"), (units.duration, 7500.0, "2 h 05 min"),
    ],
)  # fmt: skip
def test_spelling(spell: Any, value: float | None, expected: str) -> None:
    assert spell(value) == expected


def test_terminal_results_fit_80_columns() -> None:
    summary = make_summary()
    for row, label in zip(summary["results"][1:4], ("magnitude", "wanda", "x" * 60), strict=True):
        row["label"] = f"one-shot {label}"
    summary["results"][5]["label"] = "recovered + INT4"
    text = printed(results_table(summary))
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "…" not in text
    for whole in ("one-shot magnitude ", "recovered + INT4 ", "2:4", "violations"):
        assert whole in text, "everyday names stay on one line"
    for row in summary["results"]:
        line = next(line for line in text.splitlines() if f" {row['perplexity']:.2f} " in line)
        for value in (
            units.percent(row["log_gap_recovered"]), units.significant(row["kl"]),
            units.size(row["disk_bytes"]), units.size(row["packed_bytes"]),
            units.count(row["violations"]),
        ):  # fmt: skip
            assert value in line


def test_terminal_tables_at_60_columns_keep_their_names() -> None:
    summary = make_summary()
    for row in summary["results"][1:4]:
        row["label"] = f"one-shot {row['name']}"
    text = printed(results_table(summary, width=60), 60) + printed(pruning_table(summary), 60)
    assert all(len(line) <= 60 for line in text.splitlines())
    assert "…" not in text
    words = text.split()
    for whole in ("one-shot", "magnitude", "recovered", "violations", "68.3", "2.01"):
        assert whole in words
    rows = {line.split()[0]: line for line in text.splitlines() if line.split()}
    assert "42.0 s" in rows["sparsegpt"]
    for gone in ("KL", "on disk"):
        assert gone in printed(results_table(summary))
        assert gone not in text


def test_terminal_numbers_are_whole_however_large() -> None:
    row = make_result(
        "sparsegpt", 123456.7, log_gap_recovered=-12.5, kl=13.25, disk_bytes=141_000_000_000,
        packed_bytes=17_300_000_000, violations=1_234_567,
    )  # fmt: skip
    text = printed(results_table({"schema": 1, "results": [row]}))
    for value in ("123,457", "-1,250.0 %", "13.2", "141 GB", "17.3 GB", "1,234,567"):
        assert value in text
    assert all(len(line) <= 80 for line in text.splitlines())


def test_terminal_names_are_not_markup() -> None:
    summary = make_summary()
    summary["run"]["pattern"] = "[b]"
    summary["results"][0]["label"] = "[red]x[/red]"
    summary["stages"][0]["name"] = "[/nope]"
    assert "[red]x[/red]" in printed(results_table(summary))
    assert "[b]" in printed(results_table(summary))
    assert "[/nope]" in printed(stages_table(summary))


def test_terminal_stages_count_only_what_ran() -> None:
    lines = printed(stages_table(make_summary())).splitlines()
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in lines if line.split()}
    assert rows["prune"] == "reused 21.4 s –"
    assert rows["distill"] == "ran 5 min 02 s 86 %"
    assert rows["evaluate"] == "ran 48.2 s 14 %"
    assert rows["all"] == "5 min 50 s"


@pytest.mark.parametrize("table", [results_table, pruning_table, stages_table])
def test_terminal_tables_without_data(table: Any) -> None:
    assert table({"schema": 1}).row_count == 0
    nothing = dict.fromkeys(("run", "results", "stages", "layers", "pruning"))
    assert table({"schema": 1, **nothing}).row_count == 0


def with_forecast_and_goodput() -> dict[str, Any]:
    summary = make_summary()
    recovery = summary["recovery"]
    steps = [step["step"] for step in recovery["steps"]]
    rates = [1e-3] * len(steps)
    seen = forecast(steps[:100], [step["kl"] for step in recovery["steps"][:100]], rates)
    seconds = {"train": 240.0, "start": 30.0, "save": 6.0, "lost": 12.0, "other": 12.0}
    recovery["forecast"] = seen.as_dict()
    recovery["goodput"] = {
        "wall_s": 300.0, "goodput": 0.8, "num_steps": 250, "num_lost_steps": 12, "num_starts": 2,
        "seconds": seconds,
    }  # fmt: skip
    return summary


def test_forecast_and_goodput_are_shown_where_they_are_known() -> None:
    summary = with_forecast_and_goodput()
    page = parse(summary)
    assert "Forecast at step 100" in page.text
    assert "80 % interval" in page.text
    assert "80.0 % of 5 min" in page.text or "80 % of 5 min" in page.text
    assert "12 steps were done again; 2 starts" in page.text
    for words in ("training steps that count", "checkpoint stalls", "start-up"):
        assert words in page.text
    without = parse(make_summary())
    for words in ("Forecast at step", "Where the time went", "Goodput"):
        assert words not in without.text
        assert words in page.text


def test_forecast_band_starts_at_its_step_and_a_reason_is_not_drawn() -> None:
    recovery = with_forecast_and_goodput()["recovery"]
    panel = forecast_panel(recovery)
    assert panel is not None
    corners = re.search(r'<polygon class="band" points="([^"]*)"', str(panel.svg))
    assert corners is not None
    xs = [float(point.split(",")[0]) for point in corners[1].split()]
    assert min(xs) == pytest.approx(1000 * 99 / 249, abs=0.1)
    assert max(xs) == 1000
    recovery["forecast"] = {"reason": "too few points", "band": [], "predicted": None}
    assert forecast_panel(recovery) is None
