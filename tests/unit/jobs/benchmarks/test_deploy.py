"""`jobs.bench deploy`: what it measures, prints, draws and refuses; never how fast."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs import bench
from jobs.benchmarks import deploy, shares
from jobs.benchmarks.sides import decode, decode_cuda
from jobs.benchmarks.support import (
    deploy_cuda,
    linear_sides,
    linear_sides_cuda,
    whole_model,
    whole_model_cuda,
)
from jobs.benchmarks.support.random_llama import SHAPES, linear_shapes
from jobs.benchmarks.support.record import Chart
from jobs.reporting.chart_file import chart_file
from sparsify.errors import TwofourError
from sparsify.kernels.cpu.layout import KINDS
from sparsify.kernels.cpu.linear import packed_linear

SIDES = ["dense float32", "dense bfloat16", "dense int4", "bfloat16", "int4"]


def test_a_run_leaves_record_chart_and_a_last_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(deploy, "_cache_bytes", lambda: 2**16)
    words = ["deploy", "--shapes", "48x128", "16x256", "--batches", "1", "3", "--kinds", "bfloat16"]
    words += [
        "int4",
        "--repeats",
        "1",
        "--model",
        "none",
        "--threads",
        "2",
        "--record",
        str(tmp_path / "d.json"),
    ]
    before = torch.get_num_threads()
    try:
        assert bench.main([*words, "--workdir", str(tmp_path)]) == 0
    finally:
        torch.set_num_threads(before)
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "d.json").read_text())["figures"]["layers"]
    assert [row["side"] for row in rows] == SIDES * 8
    assert {(row["rows"], row["threads"], row["batch"]) for row in rows} == {
        (rows, threads, batch) for rows in (48, 16) for threads in (1, 2) for batch in (1, 3)
    }
    for first in range(0, len(rows), len(SIDES)):
        some = {row["side"]: row for row in rows[first : first + len(SIDES)]}
        dense_s = min(some[side]["median_s"] for side in SIDES[:2])
        weights = some["int4"]["rows"] * some["int4"]["columns"]
        assert some["dense float32"]["num_bytes"] == 4 * weights
        # Two values of 16 bits and 4 bits of positions for 4 weights; 2 x 4 + 4, and 16 for 128.
        assert some["bfloat16"]["num_bytes"] * 8 == 9 * weights
        assert some["int4"]["num_bytes"] * 8 == 3 * weights + weights // 8
        for row in some.values():
            assert row["ratio"] == pytest.approx(dense_s / row["median_s"])
            rate = row["num_bytes"] / row["median_s"]
            assert row["share"] == pytest.approx(rate / row["read_bytes_per_s"])
    last = json.loads(printed.splitlines()[-1])
    assert last["benchmark"] == "deploy" and last["record"] == str(tmp_path / "d.json")
    assert set(last["ratio_at_1"]) == set(SIDES) and last["targets"] == 6
    assert "int4, batch 1: least ratio" in printed
    drawing = ElementTree.parse(tmp_path / "d.svg").getroot()
    texts = [node.text for node in drawing.iter("{http://www.w3.org/2000/svg}text")]
    assert set(SIDES) < set(texts)
    assert len(list(drawing.iter("{http://www.w3.org/2000/svg}circle"))) == 2 * len(SIDES)


def test_a_whole_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def here(words: list[str], log: Path, environment: dict[str, str]) -> int:
        assert words[2] == decode.__name__ and environment == {"OMP_NUM_THREADS": "2"}
        Path(words[4]).write_text(json.dumps(decode.measure(json.loads(words[3]))))
        return 0

    monkeypatch.setattr(whole_model, "run_logged", here)
    sides = ["dense float32", "dense int4", "int4"]
    words = ["deploy", "--shapes", "none", "--model", "bench-512", "--vocabulary", "64"]
    words += ["--model-sides", *sides, "--model-batches", "2", "1", "--threads", "2"]
    words += ["--side-seconds", "600", "--record", str(tmp_path / "d.json")]
    monkeypatch.setitem(SHAPES, "bench-512", {**SHAPES["bench-512"], "num_hidden_layers": 1})
    before = torch.get_num_threads()
    try:
        assert bench.main([*words, "--workdir", str(tmp_path)]) == 0
    finally:
        torch.set_num_threads(before)
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "d.json").read_text())["figures"]["model"]
    assert [side["side"] for side in found] == sides
    shapes = linear_shapes(decode.config_of("bench-512", 64))
    weights = sum(rows * columns for rows, columns in shapes)
    rest = 2 * 64 * 512 + 3 * 512  # embeddings and head, norms
    assert found[0]["num_bytes"] == 4 * (weights + rest)
    assert found[1]["num_bytes"] == weights // 2 + weights // 32 + 2 * rest
    assert found[2]["num_bytes"] == weights * 3 // 8 + weights // 64 + 2 * rest
    for side in found:
        assert [(row["threads"], row["batch"]) for row in side["rows"]] == [(1, 1), (2, 1), (2, 2)]
        assert all(row["first_token_s"] > 0 and row["token_s"] > 0 for row in side["rows"])
        assert side["batches_left_out"] == [] and side["peak_bytes"] > side["num_bytes"]
    last = json.loads(printed.splitlines()[-1])
    dense, _, int4 = found
    assert last["tokens_per_s_at_1"]["int4"] == round(1 / int4["rows"][1]["token_s"], 3)
    ratios = [dense["rows"][at]["token_s"] / int4["rows"][at]["token_s"] for at in (0, 1)]
    (target,) = json.loads((tmp_path / "d.json").read_text())["targets"]
    assert target["measured"] == pytest.approx(min(ratios)) and target["promised"] == ">= 2.5"
    assert ElementTree.parse(tmp_path / "d.svg").getroot() is not None


def test_batches_beyond_the_seconds_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "answer", lambda model, batch: {"token_s": 1.0})
    task = {
        "side": "bfloat16", "shape": "tiny", "vocab_size": 64, "threads": [1], "batches": [1, 2],
        "budget_s": 0.0,
    }  # fmt: skip
    before = torch.get_num_threads()
    try:
        found = decode.measure(task)
    finally:
        torch.set_num_threads(before)
    assert found["rows"] == [] and found["batches_left_out"] == [1, 2]


def test_vllm_is_run_by_its_own_python(tmp_path: Path, capsys: Any) -> None:
    options = Namespace(
        model="tiny", model_sides=[], model_batches=["4", "1"], vocabulary=1024, side_seconds=9.0,
        workdir=tmp_path, vllm_python=None, llama_python=None,
    )  # fmt: skip
    assert whole_model.measure_model(options, 2) == []
    said = capsys.readouterr().out
    assert "vLLM: left out; --vllm-python names" in said
    assert "llama.cpp: left out; --llama-python names" in said
    options.vllm_python = python_with(tmp_path, vllm=FAKE_VLLM)
    (found,) = whole_model.measure_model(options, 2)
    assert found["side"] == "vLLM 0.0, dense bfloat16"
    assert [(row["threads"], row["batch"]) for row in found["rows"]] == [(2, 1), (2, 4)]
    assert all(0 < row["token_s"] < row["first_token_s"] + 9 for row in found["rows"])
    assert found["num_bytes"] > 2 * 2 * 1024 * 64  # embeddings and head of the folder


def python_with(folder: Path, **modules: str) -> str:
    """A Python that imports these modules beside what this one has."""
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text)
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={folder} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return str(python)


def test_llama_cpp_is_run_by_its_own_python(tmp_path: Path) -> None:
    options = Namespace(
        model="tiny", model_sides=[], model_batches=["3", "1"], vocabulary=1024, side_seconds=9.0,
        workdir=tmp_path, vllm_python=None,
        llama_python=python_with(tmp_path, llama_cpp=FAKE_LLAMA, gguf=FAKE_GGUF),
    )  # fmt: skip
    (found,) = whole_model.measure_model(options, 2)
    assert found["side"] == "llama.cpp (llama-cpp-python 0.0), dense Q4_0"
    assert [(row["threads"], row["batch"]) for row in found["rows"]] == [(1, 1), (2, 1), (2, 3)]
    assert all(0.01 < row["token_s"] < 9 for row in found["rows"])
    shapes = json.loads((tmp_path / "decode-tiny-1024.gguf").read_text())
    weights = {name: shape for name, shape in shapes.items() if name.endswith("weight")}
    assert len(weights) == 2 + 2 * 9 and shapes["blk.1.ffn_down.weight"] == [64, 128 // 32 * 18]
    assert shapes["vocab_size"] == 1024 and shapes["head_count_kv"] == 2
    assert found["num_bytes"] == (tmp_path / "decode-tiny-1024.gguf").stat().st_size


FAKE_GGUF = """
import json
from types import SimpleNamespace

GGMLQuantizationType = SimpleNamespace(Q4_0=2)


class GGUFWriter:
    def __init__(self, path, architecture):
        self.path, self.found = path, {}

    def add_tensor(self, name, data, raw_dtype=None):
        self.found[name] = data.shape

    def write_tensors_to_file(self):
        open(self.path, "w").write(json.dumps(self.found))

    def __getattr__(self, name):
        return lambda *given: self.found.update({name.removeprefix("add_"): (given or [None])[0]})
"""

FAKE_LLAMA = """
import ctypes, time
from types import SimpleNamespace

__version__ = "0.0"
llama_model_default_params = llama_context_default_params = SimpleNamespace
llama_backend_init = lambda: None
llama_model_load_from_file = lambda path, params: path
llama_init_from_model = lambda model, params: params
llama_free = llama_batch_free = lambda what: None
logits = (ctypes.c_float * 1024)()
logits[7] = 1.0


def llama_batch_init(num_tokens, width, num_sequences):
    lists = {name: [None] * num_tokens for name in ("token", "pos", "n_seq_id", "logits")}
    return SimpleNamespace(**lists, seq_id=[[None] for _ in range(num_tokens)])


def llama_decode(context, batch):
    count, size = batch.n_tokens, context.n_seq_max
    assert count in (size, size * 32) and sum(batch.logits[:count]) == size
    assert batch.pos[:count] == [batch.pos[0] + at % (count // size) for at in range(count)]
    assert count > size or (set(batch.token[:count]) == {7} and batch.pos[0] >= 32)
    assert max(batch.pos[:count]) < context.n_ctx // size
    time.sleep(0.02)
    return 0


llama_get_logits_ith = lambda context, index: ctypes.cast(logits, ctypes.POINTER(ctypes.c_float))
"""

FAKE_VLLM = """
import json, os, time
from pathlib import Path
from types import SimpleNamespace

__version__ = "0.0"
SamplingParams = SimpleNamespace


class LLM:
    def __init__(self, model, dtype, **options):
        assert json.loads((Path(model) / "config.json").read_text())["hidden_size"] == 64
        assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"

    def generate(self, prompts, sampling, use_tqdm):
        assert all(len(prompt["prompt_token_ids"]) == 32 for prompt in prompts)
        assert sampling.max_tokens == sampling.min_tokens
        time.sleep(0.01 * sampling.max_tokens)
"""


def test_a_side_that_fails_names_its_log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(whole_model, "run_logged", lambda *given: 1)
    options = Namespace(
        model="tiny", model_sides=["int4"], model_batches=[1], vocabulary=8, side_seconds=1.0,
        workdir=tmp_path, vllm_python=None, llama_python=None,
    )  # fmt: skip
    with pytest.raises(TwofourError, match=r"int4: ended with exit code 1; see .*decode-int4.log"):
        whole_model.measure_model(options, 1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--device", "cuda", "--kinds", "float32"], "--kinds float32: on a GPU use some of: bfl"),
        (["--shapes", "9b"], "--shapes 9b: write 8b, 70b, ROWSxCOLUMNS or none"),
        (["--shapes", "8x12"], "columns must be a multiple of 8"),
        (["--batches", "0"], "--batches 0: write numbers of tokens"),
        (["--model", "9b"], "--model 9b: use none, or one of llama-3.1-8b"),
        (["--model-sides", "int3"], "--model-sides int3: use some of dense float32"),
        (["--vllm-python", "/none"], "--vllm-python /none: no such file; name an environment's"),
        (["--llama-python", "/none"], "--llama-python /none: no such file; name an environment's"),
        (["--model-batches", "x"], "--model-batches x: write numbers of prompts"),
        (["--kinds", "int3"], "--kinds int3: unknown; use one of: float32"),
    ],
)
def test_a_wrong_value_is_one_line(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert bench.main(["deploy", *words, "--threads", "1", "--workdir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_every_side_takes_its_copies_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def note(inputs: torch.Tensor, blocks: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(blocks.data_ptr())
        return packed_linear(inputs, blocks, *rest)

    monkeypatch.setattr(linear_sides, "packed_linear", note)
    for kind in KINDS:
        seen.clear()
        side = linear_sides.packed(kind, 16, 128, 3 * 16 * 128 * 5, "auto")
        for _ in range(40):
            assert side.run(torch.randn(2, 128)).shape == (2, 16)
        copies = len(set(seen))
        assert copies * side.num_bytes >= 3 * 16 * 128 * 5 and copies >= 2
        assert seen == (seen[:copies] * 40)[:40]


def test_torch_int4_is_fed_as_it_wants() -> None:
    """Against its meaning, (code - 8) * scale + zero: a wrong layout would be timed as well."""
    torch.manual_seed(0)
    codes = torch.randint(0, 16, (32, 256), dtype=torch.int32)
    scales = torch.rand(2, 32, 2, dtype=torch.bfloat16)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    inputs = torch.randn(3, 256, dtype=torch.bfloat16)
    output = torch.ops.aten._weight_int4pack_mm_for_cpu(inputs, packed, 128, scales)
    scale, zero = scales.float().transpose(0, 1).repeat_interleave(128, 1).unbind(-1)
    expected = inputs.float() @ ((codes - 8) * scale + zero).T
    # bfloat16 outputs; measured 0.002 of the norm.
    assert (output.float() - expected).norm() < 0.01 * expected.norm()


def test_a_chart_of_curves_with_gaps() -> None:
    curves = {"a & b": [2.0, None, 8.0], "c": [1.0, 1.0, 1.0]}
    drawing = ElementTree.fromstring(chart_file(Chart("Speed <2>", "tokens", [1, 4, 16], curves)))
    lines = list(drawing.iter("{http://www.w3.org/2000/svg}polyline"))
    assert [len(line.attrib["points"].split()) for line in lines] == [2, 3]
    heights = [float(point.split(",")[1]) for point in lines[0].attrib["points"].split()]
    assert heights[0] > heights[1]  # down the page is less
    texts = [node.text for node in drawing.iter("{http://www.w3.org/2000/svg}text")]
    assert {"Speed <2>", "tokens", "a & b", "c", "1", "4", "16"} <= set(texts)


def test_figures_of_a_gpu_become_tables_and_targets() -> None:
    """At the worst shape: INT4 twice as fast as cuBLAS here and five times there is no 4."""
    rows = [
        {"rows": rows, "columns": 4096, "batch": batch, "side": side, "median_s": 1e-5 / ratio,
         "ratio": ratio, "num_bytes": 1000, "bytes_per_s": 1e8 * ratio, "share": 0.5 * ratio / 5}
        for rows in (1024, 4096)
        for batch in (1, 16)
        for side, ratio in (("dense bfloat16", 1.0), ("dense int4", 2.5), ("bfloat16", 1.6),
                            ("int4", 5.0 if rows == 4096 else 2.0))
    ]  # fmt: skip
    outcome = deploy_cuda.summarise(rows, {}, 1)
    met = {target.what: (target.measured, target.is_met) for target in outcome.targets}
    assert met["int4, batch 1: least ratio to cuBLAS"] == (2.0, False)
    assert met["int4, batch 16: least ratio to cuBLAS"] == (2.0, False)
    assert met["bfloat16, batch 1: least ratio to cuBLAS"] == (1.6, True)
    assert met["bfloat16, batch 1: least share of what reading reaches"] == (0.16, False)
    assert met["int4, every batch: least ratio to cuBLAS"] == (2.0, True)
    assert met["int4, batch 1: least ratio to torch's dense INT4"][0] == pytest.approx(0.8)
    assert outcome.tables[0].rows[-1] == ("4096 x 4096, int4", "5.00", "5.00")
    assert outcome.summary["ratio_at_1"]["int4"] == pytest.approx(10**0.5, abs=1e-3)


def test_without_layers_there_is_no_table_of_them() -> None:
    outcome = deploy_cuda.summarise([], {}, 1)
    assert (outcome.tables, outcome.targets) == ([], [])


def test_a_whole_model_on_a_gpu_becomes_a_table_and_targets() -> None:
    sides = (("dense bfloat16", 6e-3, 12e-3), ("bfloat16", 4e-3, 10e-3), ("int4", 2e-3, 12e-3))
    found = [
        {"side": side, "num_bytes": 10**9,
         "rows": [{"batch": 1, "token_s": at_1}, {"batch": 16, "token_s": at_16}]}
        for side, at_1, at_16 in sides
    ]  # fmt: skip
    (table,) = whole_model_cuda.model_tables(found)
    assert [row[1:3] for row in table.rows] == [
        ("6.00 (1.00x)", "12.00 (1.00x)"), ("4.00 (1.50x)", "10.00 (1.20x)"),
        ("2.00 (3.00x)", "12.00 (1.00x)"),
    ]  # fmt: skip
    assert [target.is_met for target in whole_model_cuda.model_targets(found)] == [True, False]
    assert whole_model_cuda.model_targets(found[1:]) == []


@pytest.mark.parametrize("side", ["dense bfloat16", "bfloat16", "int4"])
def test_the_step_that_becomes_a_graph_answers_as_the_model_does(side: str) -> None:
    model = decode_cuda.build(side, "bench-512", 1024, "cpu").float()
    steps = decode_cuda.Steps(model, 2)
    answered = [steps.ids_B1.clone()]
    for _ in range(3):
        steps.once()
        answered.append(steps.ids_B1.clone())
    ids_BT = torch.randint(0, 1024, (2, 32), generator=torch.Generator().manual_seed(2))
    for found_B1 in answered:
        with torch.no_grad():
            best_B1 = model(ids_BT).logits[:, -1].argmax(-1, keepdim=True)
        assert torch.equal(found_B1, best_B1)
        ids_BT = torch.cat([ids_BT, best_B1], 1)


@pytest.mark.parametrize("kind", ["bfloat16", "int4"])
@pytest.mark.parametrize("tokens", [1, 5, 16, 33, 64])
@pytest.mark.parametrize(("rows", "columns"), [(16, 256), (200, 1100), (4096, 14336), (28672, 512)])
def test_shares_divide_the_weight(kind: str, tokens: int, rows: int, columns: int) -> None:
    chosen, *others = shares.plans_of(kind, rows, columns, tokens)
    assert 8 * chosen.token_tiles >= tokens > 4 * (chosen.token_tiles - 1)
    for plan in (chosen, *others):
        assert -(-rows // 16) % (plan.row_tiles * plan.row_warps) == 0
        assert plan.row_warps * plan.step_warps <= 16
        assert plan.step_warps * plan.unrolled_steps < 2 * -(-columns // 256)


def test_shares_without_a_gpu_are_refused(capsys: Any) -> None:
    assert bench.main(["shares"]) == 2
    assert capsys.readouterr().err.startswith("error: shares: there is no GPU here")


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "float8", "int4", "nf4"])
def test_random_layers_of_a_gpu_have_the_bytes_that_are_counted(kind: str) -> None:
    size = 128 if kind in ("int8", "int4", "nf4") else 0
    prepared = linear_sides_cuda.random_prepared(kind, 64, 512, size, device="cpu")
    bits = {"bfloat16": 9, "int8": 5.125, "float8": 5 + 32 / 512, "int4": 3.125, "nf4": 3.125}
    assert sum(t.nbytes for t in prepared if t is not None) == 64 * 512 * bits[kind] / 8
