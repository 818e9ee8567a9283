"""Benchmarks: the command line, the record, the tables, and a tiny instance of each. No timing."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster import machine
from jobs import bench
from jobs.benchmarks import data, kernel, memory, model, prune, quality, scaling
from jobs.benchmarks.sides.twofour import prune_folder
from jobs.benchmarks.support import commands, environment, processes, record
from jobs.benchmarks.support.layer_error import (
    dense_hessians,
    judge,
    mask_agreement,
    relative_error,
)
from jobs.benchmarks.support.random_llama import (
    block_num_weights,
    llama_config,
    random_model,
    write_checkpoint,
)
from jobs.cli.compose import load_config
from sparsify.comm import Comm
from sparsify.data.rows import TokenRows
from sparsify.errors import InputError
from sparsify.masks.storage import save_masks
from sparsify.models.load import load_model
from tests.conftest import REPOSITORY

VOCABULARY = 1024  # that of the embedded tokenizer, which random checkpoints borrow


@pytest.fixture(scope="module")
def random_folder(tmp_path_factory) -> Path:
    """A random checkpoint of two tiny blocks, one file per block."""
    folder = tmp_path_factory.mktemp("bench") / "random"
    write_checkpoint(folder, llama_config("tiny", 2, 64, VOCABULARY), 0, torch.float32)
    return folder


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "rows.safetensors"
    generator = torch.Generator().manual_seed(0)
    save_file({"input_ids": torch.randint(0, VOCABULARY, (6, 32), generator=generator)}, path)
    return path


@pytest.fixture(scope="module")
def pruned_folder(tmp_path_factory, random_folder, rows_file) -> Path:
    """What this project's side of the comparison makes of the random checkpoint."""
    folder = tmp_path_factory.mktemp("side")
    prune_folder(
        "memory", "block", random_folder, rows_file, folder / "out", folder / "r.json", 1, 2
    )
    return folder


def outcome(**changes) -> record.Outcome:
    values = {
        "device": "cpu", "num_threads": 1, "settings": {"size": 3}, "figures": {"ratio": 0.5},
        "tables": [record.Table(("name", "time"), [("first", "1.5 s"), ("b", "12.0 s")])],
        "targets": [record.Target.at_most("ratio", 0.4, 0.5)], "notes": ["a note"],
    }  # fmt: skip
    return record.Outcome(**{**values, **changes})


# The command line


def test_help_is_quick_and_names_every_benchmark() -> None:
    code = (
        "import sys; from jobs import bench; bench.parser().format_help();"
        "print([n for n in ('torch', 'ray', 'hydra', 'transformers') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=180,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
    text = bench.parser().format_help()
    files = {path.stem for path in (REPOSITORY / "jobs" / "benchmarks").glob("*.py")}
    known = bench.described()
    assert {*known} == files - {"__init__"}
    for name, module in known.items():
        assert f"    {name} " in text
        assert " ".join(module["SUMMARY"].split()) in " ".join(text.split())
        assert all(f"  python -m jobs.bench {words}\n" in text for words in module["EXAMPLES"])


@pytest.mark.parametrize("name", sorted(bench.described()))
def test_every_example_of_the_help_can_be_read(name) -> None:
    for example in bench.described()[name]["EXAMPLES"]:
        words = example.split()
        assert words[0] == name
        options = bench.parser().parse_args(words)
        assert options.benchmark == name
        assert options.run.__module__ == f"jobs.benchmarks.{name}"


def test_a_benchmark_is_a_file_of_the_folder(tmp_path, monkeypatch) -> None:
    """One that is dropped into the folder is found, and no other one is imported to run it."""
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").write_text("")
    (tmp_path / "benchmarks" / "other.py").write_text(
        "import not_there\nSUMMARY = 'another one'\nEXAMPLES = ()\n"
    )
    (tmp_path / "benchmarks" / "fresh.py").write_text(
        "SUMMARY = 'a fresh one'\nEXAMPLES = ('fresh --size 3',)\n"
        "def add_arguments(parser):\n    parser.add_argument('--size', type=int)\n"
        "def run(options):\n    return options.size\n"
    )
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "bench.py"))
    monkeypatch.setattr("jobs.benchmarks.__path__", [str(tmp_path / "benchmarks")])
    options = bench.parser().parse_args(["fresh", "--size", "3", "--out", "a.json", "--save"])
    assert options.run(options) == 3
    assert options.record == Path("a.json")
    assert "a fresh one" in bench.parser().format_help()


def test_out_is_the_record_or_what_the_benchmark_says(capsys) -> None:
    options = bench.parser().parse_args(["quality", "--out", "a.md", "--record", "a.json"])
    assert (options.markdown, options.record) == (Path("a.md"), Path("a.json"))
    with pytest.raises(SystemExit):
        bench.parser().parse_args(["quality", "--help"])
    text = capsys.readouterr().out
    assert "--record FILE.json" in text
    assert "--out FILE.md" in text


@pytest.mark.parametrize("words", [[], ["prune"], ["prune", "--against", "other"], ["kernel", "x"]])
def test_a_wrong_command_line_ends_with_2(words, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        bench.main(words)
    assert caught.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_a_wrong_value_ends_with_2_and_one_line(tmp_path, capsys) -> None:
    assert bench.main(["kernel", "--shapes", "12by8", "--workdir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --shapes 12by8")
    assert error.count("\n") == 1


def test_a_run_prints_a_table_and_leaves_a_record(tmp_path, capsys) -> None:
    words = ["kernel", "--shapes", "8x16", "--block-size", "8", "--repeats", "1", "--threads", "1"]
    assert bench.main([*words, "--workdir", str(tmp_path), "--out", str(tmp_path / "k.json")]) == 0
    printed = capsys.readouterr().out
    assert "8 x 16" in printed
    found = json.loads((tmp_path / "k.json").read_text())
    assert found["command"].startswith("python -m jobs.bench kernel --shapes 8x16")
    assert [row["part"] for row in found["figures"]["layers"]] == ["block", "layer"]
    # Both sweeps follow the same algorithm; in float32 a tie may be broken the other way.
    assert all(row["mask_agreement"] > 0.99 for row in found["figures"]["layers"])
    # On a CPU both sides of GPTQ are the loop over columns.
    (quantized,) = found["figures"]["gptq"]
    assert (quantized["scheme"], quantized["columns"]) == ("int4", 16)
    assert quantized["code_agreement"] == 1 and quantized["error_ratio"] == pytest.approx(1)


# The record


def test_the_record_says_where_and_with_what() -> None:
    found = record.build_record("kernel", "python -m jobs.bench kernel", outcome(), 0.0)
    assert {
        "schema", "benchmark", "date", "command", "duration_s", "device", "cpu", "num_cpus",
        "num_threads", "load_average_1min", "versions", "settings", "figures", "targets", "notes",
    } <= found.keys()  # fmt: skip
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", found["date"])
    assert found["versions"]["torch"] == torch.__version__
    assert found["targets"] == [
        {"what": "ratio", "promised": "<= 0.4", "measured": 0.5, "is_met": False}
    ]
    json.dumps(found, allow_nan=False)
    name = record.default_name({**found, "date": "2026-01-02", "accelerator": "NVIDIA H100"})
    assert name == "2026-01-02-bench-kernel-nvidia-h100.json"


def test_a_record_is_whole_or_absent(tmp_path) -> None:
    record.write_record({"a": 1}, tmp_path / "new" / "r.json")
    with pytest.raises(TypeError):
        record.write_record({"a": object()}, tmp_path / "new" / "r.json")
    assert json.loads((tmp_path / "new" / "r.json").read_text()) == {"a": 1}


def test_tables_align_and_targets_are_judged() -> None:
    lines = record.render(outcome()).splitlines()
    assert lines[:4] == ["name     time", "-" * 13, "first   1.5 s", "b      12.0 s"]
    assert "missed" in record.render(outcome())
    assert "met" in record.render(outcome(targets=[record.Target.at_least("speed", 1.7, 1.8)]))


def test_peak_memory_grows_with_what_is_held() -> None:
    before = machine.peak_memory_bytes()
    held = torch.ones(16 * 2**20)
    assert machine.peak_memory_bytes() >= max(before, held.numel() * 4)


# Models


def test_a_random_checkpoint_loads_and_has_one_file_per_block(random_folder) -> None:
    model = load_model(random_folder)
    assert len(list(random_folder.glob("*.safetensors"))) == 4
    block = sum(weight.numel() for weight in model.model.layers[0].parameters())
    assert block == block_num_weights(model.config)


def test_a_random_model_depends_on_the_seed_and_can_run() -> None:
    config = llama_config("tiny", 1, 16, VOCABULARY)
    first, second, other = (random_model(config, seed, torch.float32, "cpu") for seed in (0, 0, 1))
    ids = torch.arange(8).reshape(1, 8)
    logits = [model(input_ids=ids).logits for model in (first, second, other)]
    assert bool(torch.isfinite(logits[0]).all())
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


# The comparison with llm-compressor


def test_this_sides_result_has_times_memory_and_a_checkpoint(pruned_folder) -> None:
    figures = json.loads((pruned_folder / "r.json").read_text())
    assert figures["seconds"].keys() == {"import", "load", "prune", "save"}
    assert figures["cpu_seconds"].keys() == figures["seconds"].keys()
    assert all(value >= 0 for value in figures["seconds"].values())
    assert figures["peak_bytes"] >= figures["imported_bytes"] > 0
    assert figures["prune_phases"]["solve"] > 0
    load_model(pruned_folder / "out")


def test_the_streamed_walk_ends_in_the_same_weights(
    tmp_path, random_folder, rows_file, pruned_folder
) -> None:
    prune_folder(
        "streamed", "block", random_folder, rows_file, tmp_path / "out", tmp_path / "r.json", 1, 2
    )
    both = {"memory": pruned_folder / "out", "streamed": tmp_path / "out"}
    names = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    assert mask_agreement(both["memory"], both["streamed"], names) == 1.0


def test_the_judges_hessian_is_that_of_every_layers_own_input(random_folder, rows_file) -> None:
    model = load_model(random_folder)
    rows = TokenRows.whole(load_file(rows_file)["input_ids"])
    names = ["model.layers.1.self_attn.k_proj", "model.layers.1.mlp.down_proj",
             "model.layers.1.self_attn.q_proj"]  # fmt: skip
    found = dense_hessians(model, names, rows, batch_size=4)
    for name in names:
        seen = []
        handle = model.get_submodule(name).register_forward_hook(
            lambda _, args, out, seen=seen: seen.append(args[0])
        )
        with torch.no_grad():
            model(input_ids=rows.ids_NT, use_cache=False)
        handle.remove()
        inputs_TI = seen[0].flatten(0, 1).double()
        expected = inputs_TI.T @ inputs_TI / len(inputs_TI)
        # float32 products of batches of other sizes; 1e-5 of the largest entry was never reached.
        assert float((found[name] - expected).abs().max() / expected.abs().max()) < 1e-5
    assert found[names[0]] is found[names[2]]  # q and k share their input


def test_relative_error_is_the_share_of_the_output_that_is_lost() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs_TI = torch.randn(50, 8, generator=generator, dtype=torch.float64)
    dense_OI = torch.randn(4, 8, generator=generator, dtype=torch.float64)
    pruned_OI = dense_OI * (torch.arange(8) % 2)
    lost = ((dense_OI - pruned_OI) @ inputs_TI.T).square().sum()
    expected = float(lost / (dense_OI @ inputs_TI.T).square().sum())
    found = relative_error(dense_OI, pruned_OI, inputs_TI.T @ inputs_TI / 50)
    assert math.isclose(found, expected, rel_tol=1e-12)


def test_the_judge_counts_violations_and_errors(random_folder, rows_file, pruned_folder) -> None:
    rows = TokenRows.whole(load_file(rows_file)["input_ids"])
    sides = {"pruned": pruned_folder / "out", "dense": random_folder}
    found = judge(random_folder, sides, rows, 3)
    assert found["pruned"]["num_violations"] == 0
    assert found["pruned"]["sparsity"] == 0.5
    assert 0 < found["pruned"]["mean_relative_error"] < 1
    assert found["dense"]["mean_relative_error"] == 0
    weights = sum(
        load_model(random_folder).get_submodule(name).weight.numel()
        for name in found["dense"]["layers"]
    )
    assert found["dense"]["num_violations"] == weights // 4  # every group of a dense layer is full


def test_the_comparison_has_a_ratio_and_a_target_for_each_promise() -> None:
    side = {
        "seconds": {"import": 5.0, "load": 1.0, "prune": 8.0, "save": 1.0},
        "cpu_seconds": {"import": 5.0, "load": 1.0, "prune": 7.0, "save": 1.0},
        "peak_bytes": 10**9, "imported_bytes": 10**8, "layers": {"h.0.a": 0.2, "h.1.a": 0.4},
        "solve_s": 2.0,
        "mean_relative_error": 0.3, "num_violations": 0, "sparsity": 0.5,
    }  # fmt: skip
    quick = {**side, "seconds": {"import": 9.0, "load": 0.5, "prune": 1.0, "save": 0.5}}
    figures = {
        "twofour": prune._median_run([quick]),
        "llmcompressor": prune._median_run([side]),
        "mask_agreement": 0.5,
    }
    found = prune.summarise(figures, {}, num_threads=2)
    assert found.figures["ratio"]["total_s"] == 0.2  # 2 s and 10 s: imports do not count
    assert [target.is_met for target in found.targets] == [True] * 5
    assert "0.200" in found.tables[0].render()
    assert found.figures["twofour"]["first_block_error"] == 0.2


def test_the_other_sides_log_says_how_long_it_solved() -> None:
    log = "SGPT | METRIC - time 0.41s\nMETRIC - error 3.0\nSGPT | METRIC - time 1.75s\n"
    assert math.isclose(prune.logged_seconds(log), 2.16)


def test_both_sides_run_alike_and_the_first_runs_do_not_count(tmp_path, monkeypatch) -> None:
    started: list[tuple[str, list[str], dict[str, str]]] = []

    def run_logged(words, log, variables):
        side = "llmcompressor" if "-P" in words else "twofour"
        started.append((side, words, variables))
        taken_s = 100.0 if len(started) <= 2 else 1.0 + len(started)
        clock = {"load": 0.0, "prune": taken_s, "save": 0.0}
        figures = {
            "seconds": {"import": 1.0, **clock}, "cpu_seconds": clock, "peak_bytes": 1,
            "imported_bytes": 1, "prune_phases": {"factor": 1.0, "solve": 1.0},
        }  # fmt: skip
        log.write_text("METRIC - time 0.5s")
        (log.parent / f"{side}.json").write_text(json.dumps(figures))
        return 0

    judged = {"layers": {"h.0.a": 0.2}, "mean_relative_error": 0.3, "num_violations": 0,
              "sparsity": 0.5}  # fmt: skip
    monkeypatch.setattr(prune, "run_logged", run_logged)
    monkeypatch.setattr(prune, "llmcompressor_python", lambda folder: Path("python"))
    monkeypatch.setattr(prune, "installed_versions", lambda python, names: {})
    monkeypatch.setattr(prune, "_prepare", lambda options, work: (tmp_path, None))
    monkeypatch.setattr(prune, "compare", lambda *given: {
        **{side: dict(judged) for side in prune._SIDES}, "mask_agreement": 1.0,
    })  # fmt: skip
    options = Namespace(
        model="random", samples=2, length=8, batch_size=1, threads=1, repeats=3, walk="memory",
        order="dense", seed=0, workdir=tmp_path,
    )  # fmt: skip
    found = prune.run(options)
    assert [side for side, _, _ in started] == ["twofour", "llmcompressor"] * 4
    assert found.figures["twofour"]["all_totals_s"] == [4.0, 6.0, 8.0]
    assert found.figures["llmcompressor"]["all_totals_s"] == [5.0, 7.0, 9.0]
    (_, ours, our_variables), (_, theirs, their_variables) = started[:2]
    assert our_variables == their_variables and "MALLOC_MMAP_THRESHOLD_" in our_variables
    assert ours[3:5] == ["memory", "dense"] and theirs[3] == "dense"
    assert ours[5:7] == theirs[4:6] and ours[-2:] == theirs[-2:] == ["1", "1"]


def test_the_median_run_counts() -> None:
    runs = [
        {"seconds": {"load": 0.0, "prune": s, "save": 0.0}, "cpu_seconds": dict.fromkeys(
            ("load", "prune", "save"), 0.0)}
        for s in (5.0, 1.0, 3.0)
    ]  # fmt: skip
    found = prune._median_run(runs)
    assert found["total_s"] == 3.0
    assert found["all_totals_s"] == [5.0, 1.0, 3.0]


def test_an_environment_is_used_again_only_if_it_is_what_is_wanted(tmp_path, monkeypatch) -> None:
    folder = tmp_path / f"llmcompressor-{environment.LLMCOMPRESSOR}"
    calls = []

    def fake(words, log, variables=None):
        calls.append(words)
        if "venv" in words:
            Path(words[-1]).mkdir(parents=True)
        log.write_text("torch==2.0\nother @ file:///x\n" if "list" in words else "")
        return 0

    monkeypatch.setattr(environment, "run_logged", fake)
    assert environment.llmcompressor_python(tmp_path) == folder / "bin" / "python"
    assert len(calls) == 3
    environment.llmcompressor_python(tmp_path)
    assert len(calls) == 3  # complete: nothing is run again
    assert environment.installed_versions(folder / "bin" / "python", ("torch", "x")) == {
        "torch": "2.0", "x": "not installed",
    }  # fmt: skip
    monkeypatch.setattr(environment, "run_logged", lambda *_: 1)
    (folder / "installed.json").unlink()
    with pytest.raises(InputError, match="exit code 1"):
        environment.llmcompressor_python(tmp_path)


# Scaling


def test_one_process_prunes_and_its_masks_are_compared(tmp_path, monkeypatch) -> None:
    task = {
        "shape": "tiny", "blocks": 1, "method": "magnitude", "samples": 8, "length": 16,
        "batch_size": 4, "seed": 0, "reduction": "fast",
    }  # fmt: skip
    scaling.prune_as_worker(0, 1, task, tmp_path)
    found = scaling.summarise(tmp_path, [1], task)
    assert found.figures["1"]["speedup"] == 1.0
    assert found.figures["1"]["mask_agreement"] == 1.0
    assert Comm.single().world_size == 1  # the group is gone again
    assert not torch.distributed.is_initialized()


def test_agreement_is_counted_by_groups() -> None:
    first = {"a": torch.zeros(2, 8, dtype=torch.bool)}
    second = {"a": first["a"].clone()}
    second["a"][0, 1] = second["a"][0, 2] = True  # two places, one group of the four
    assert scaling.group_agreement(first, second) == 0.75


def test_promises_of_scaling(tmp_path) -> None:
    mask = {"a": torch.ones(2, 4, dtype=torch.bool)}
    for num_workers, seconds in ((1, 10.0), (2, 5.0)):
        save_masks(tmp_path / f"masks-{num_workers}.safetensors", mask)
        text = json.dumps({"seconds": seconds, "phases": {}})
        (tmp_path / f"{num_workers}.json").write_text(text)
    found = scaling.summarise(tmp_path, [1, 2], {"reduction": "fixed"})
    assert [(t.promised, t.is_met) for t in found.targets] == [(">= 1.7", True), (">= 1", True)]


# Memory


def test_a_commands_memory_is_watched_with_its_children(tmp_path) -> None:
    # The child takes 60 MB and leaves its parent; both say what they are only by the mark.
    child = "x = bytearray(60_000_000); import time; time.sleep(1.5)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    found = processes.run_watched(
        [sys.executable, "-c", code], tmp_path / "log", limit_bytes=None, is_enforced=False
    )
    assert found.returncode == 0
    assert found.num_kills is None
    assert 60e6 < found.peak.held < 200e6
    assert sum(found.peak.by_command.values()) == found.peak.held


def test_the_own_control_group_is_found_in_both_versions() -> None:
    root = Path("/sys/fs/cgroup")
    v1 = "4:memory:/a/b\n2:cpu,cpuacct:/\n0::/\n"
    assert processes.own_memory_group(v1) == (root / "memory/a/b", False)
    assert processes.own_memory_group("0::/user.slice\n") == (root / "user.slice", True)
    with pytest.raises(InputError, match="no memory group"):
        processes.own_memory_group("2:cpu:/\n")


def test_kills_are_read_in_both_versions(tmp_path) -> None:
    assert processes.num_kills(tmp_path) == 0
    (tmp_path / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n")
    assert processes.num_kills(tmp_path) == 2
    (tmp_path / "memory.events").write_text("low 0\noom 1\noom_kill 1\n")
    assert processes.num_kills(tmp_path) == 1


def test_the_memory_benchmark_prunes_by_the_ordinary_command(tmp_path) -> None:
    options = bench.parser().parse_args(["memory", "--set", "prune.damping=0.1"])
    words = memory.prune_command(options, tmp_path / "m", tmp_path / "r")
    assert words[1:4] == ["-m", "jobs.prune", "stages=[prune]"]
    assert words[-1] == "prune.damping=0.1"
    config = load_config("prune", words[3:])
    assert config.model.dtype == "bfloat16"
    assert config.cluster.num_workers == 1


def test_the_peak_is_held_against_the_limit() -> None:
    use = processes.MemoryUse(anonymous=2 * 10**9, shared=10**9, by_command={"python": 3 * 10**9})
    finished = processes.Finished(0, 12.0, use, peak_file=5 * 10**9, num_kills=0)
    found = memory.summarise(finished, 6 * 10**9, 4 * 10**9, {})
    assert found.figures["peak_held_bytes"] == 3 * 10**9
    assert [target.is_met for target in found.targets] == [True, True, True]
    assert "0.75" in found.tables[0].render()


def test_a_command_that_failed_meets_no_limit() -> None:
    finished = processes.Finished(-9, 12.0, processes.MemoryUse(), peak_file=0, num_kills=None)
    found = memory.summarise(finished, 6 * 10**9, 4 * 10**9, {})
    assert [target.is_met for target in found.targets] == [False, True]


# Quality


def test_models_are_named_with_their_text() -> None:
    assert commands.parse_model("embedded").calibration == "stdlib"
    found = commands.parse_model("story=models/s:hf:name:config@train")
    assert (found.name, found.path, found.calibration) == (
        "story",
        "models/s",
        "hf:name:config@train",
    )
    for text in ("models/s", "a=b", "=p:c", "a/b=p:c", "a=:c"):
        with pytest.raises(InputError, match="--models"):
            commands.parse_model(text)


def test_the_quality_commands_are_ones_that_can_be_read(tmp_path) -> None:
    options = bench.parser().parse_args(["quality", "--methods", "sparsegpt", "magnitude"])
    model = commands.parse_model("embedded")
    words = quality.prune_words(model, options, tmp_path / "embedded")
    config = load_config("prune", words[1:])
    assert (config.prune.method, config.prune.baselines) == ("magnitude", ["sparsegpt"])
    target = tmp_path / "embedded-sparsegpt-recovered"
    words = quality.recover_words(model, options, tmp_path / "embedded", target, "sparsegpt")
    config = load_config("prune", words[1:])
    assert config.run.from_.endswith("embedded/prune/sparsegpt")
    assert config.distill.num_tokens == 300_000
    own = quality._OWN_RUN[quality.PLAIN]
    config = load_config("prune", quality.prune_words(model, options, tmp_path / "own", own)[1:])
    assert list(config.stages) == ["prune", "evaluate"]
    again = quality.prune_words(model, options, tmp_path / "own-2", own, stages="[prune]")
    assert list(load_config("prune", again[1:]).stages) == ["prune"]
    assert (config.prune.method, config.prune.rotation_steps) == ("twofour", 0)
    words = quality.recover_words(model, options, tmp_path / "own", target, quality.PLAIN)
    assert load_config("prune", words[1:]).run.from_.endswith("own/prune/twofour")


def test_quality_collects_what_the_commands_left(tmp_path) -> None:
    def leave(folder: Path, figures: dict[str, float], twofour_s: float = 4.0) -> None:
        (folder / "prune").mkdir(parents=True)
        rows = [
            {"name": name, "perplexity": value, "kl": 0.1, "top1_agreement": 0.5}
            for name, value in figures.items()
        ]
        (folder / "summary.json").write_text(json.dumps({"results": rows}))
        metrics = {"metrics": {"seconds": {"sparsegpt": 2.0, "twofour": twofour_s}}}
        (folder / "prune" / "record.json").write_text(json.dumps(metrics))

    leave(tmp_path / "run", {"dense": 4.0, "sparsegpt": 16.0, "twofour": 8.0})
    leave(tmp_path / "run-2", {}, twofour_s=3.0)
    leave(tmp_path / "own", {"dense": 4.0, "twofour": 12.0})
    leave(tmp_path / "a", {"dense": 4.0, "sparsegpt": 16.0, "recovered": 8.0})
    leave(tmp_path / "b", {"dense": 4.0, "twofour": 8.0, "recovered": 4.0})
    found = quality.collect(
        {"sparsegpt": [tmp_path / "run"], quality.PLAIN: [tmp_path / "own"],
         "twofour": [tmp_path / "run", tmp_path / "run-2"]},
        {"sparsegpt": tmp_path / "a", "twofour": tmp_path / "b"},
    )  # fmt: skip
    assert list(found) == ["dense", "sparsegpt", quality.PLAIN, "twofour"]
    assert found[quality.PLAIN]["perplexity"] == 12.0
    # ln 16 - ln 4 is twice ln 8 - ln 4: half of the excess is gone.
    assert math.isclose(found["twofour"]["excess_removed"], 0.5)
    assert found["sparsegpt"]["excess_removed"] == 0.0
    assert math.isclose(found["twofour"]["recovered"]["excess_removed"], 1.0)
    assert (found["twofour"]["seconds"], found["twofour"]["time_ratio"]) == (3.0, 1.5)
    assert (found[quality.PLAIN]["seconds"], found[quality.PLAIN]["time_ratio"]) == (4.0, 2.0)
    assert [target.is_met for target in quality.targets_of("embedded", found)] == [True, True]
    page = quality.markdown({"embedded": found}, "python -m jobs.bench quality")
    assert "python -m jobs.bench quality" in page
    assert "| twofour | 8.000 | 0.1000 | 50.0 % | 3.0 | 1.50 | 4.000 | 0.1000 | 100.0 % |" in page


def test_no_excess_is_no_division_by_zero() -> None:
    assert quality.excess_removed(4.0, 4.0, 4.0) is None


# Kernel and model


def test_the_plain_column_loop_makes_up_for_what_it_prunes() -> None:
    """It lowers the error that its own Hessian measures, and leaves two of every four."""
    generator = torch.Generator().manual_seed(0)
    inputs_TI = torch.randn(200, 16, generator=generator) @ torch.randn(16, 16, generator=generator)
    hessian_II = inputs_TI.T @ inputs_TI / 200
    upper_II = torch.linalg.cholesky(torch.linalg.inv(hessian_II), upper=True)
    dense_OI = torch.randn(8, 16, generator=generator)
    pruned_OI = kernel.column_loop(dense_OI, upper_II, block_size=8)
    assert bool(((pruned_OI != 0).reshape(-1, 4).sum(1) == 2).all())
    chosen_OI = dense_OI.masked_fill(pruned_OI == 0, 0.0)
    error, uncompensated = (
        relative_error(dense_OI, weight_OI, hessian_II) for weight_OI in (pruned_OI, chosen_OI)
    )
    assert error < 0.8 * uncompensated
    # The block size moves work from columns to products, and no result.
    other_OI = kernel.column_loop(dense_OI, upper_II, block_size=16)
    assert torch.allclose(pruned_OI, other_OI, atol=1e-4)


def test_a_model_is_measured_block_by_block_and_worked_out(tmp_path) -> None:
    out = tmp_path / "m.json"
    words = ["model", "--shape", "tiny", "--blocks", "2", "--samples", "4", "--length", "16",
             "--device", "cpu", "--threads", "1", "--order", "dense", "--overlap",
             "--document-length", "8"]  # fmt: skip
    assert bench.main([*words, "--workdir", str(tmp_path), "--out", str(out)]) == 0
    figures = json.loads(out.read_text())["figures"]
    assert len(figures["block_s"]) == len(figures["block_phases_s"]) == 2
    assert all(phases["load"] for phases in figures["block_phases_s"])  # from files, as the stage
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["model-tiny-2-float32"]
    assert figures["block_phases_s"][0]["statistics"] > 0
    assert figures["limits_s"].keys() == {"statistics", "factor", "solve", "forward"}
    assert figures["overlap"]["num_equal_masks"] == figures["overlap"]["num_layers"] == 14
    assert figures["overlap"]["time_ratio"] > 0
    # All blocks of the shape were measured, so the whole model takes what was measured.
    assert figures["whole_model"]["total_s"] == figures["total_s"]


def test_limits_of_llama_8b_are_those_of_paper_and_pencil() -> None:
    config = llama_config("llama-3.1-8b", 1, 2048, VOCABULARY)
    found = model.limits(config, 512, 2048, {"model": 1.0, "float32": 1.0})
    num_tokens = 512 * 2048
    linears = 2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096
    forward = 2 * num_tokens * linears + 2 * num_tokens * 2048 * 4096
    assert found["forward"] == forward
    assert found["statistics"] == forward + num_tokens * (3 * 4096**2 + 14336**2)
    assert math.isclose(found["factor"], 2 / 3 * (3 * 4096**3 + 14336**3))
    columns = 2 * 4096 + 2 * 1024 + 2 * 14336
    assert found["solve"] == columns * 4096**2 + 4096 * 14336**2
    figures = {"block_s": [5.0, 2.0, 1.0], "total_s": 9.0, "block_bytes": 10, "limits_s": found}
    assert model.extrapolate(figures, 32)["total_s"] == 9.0 + 29 * 2.0  # the middle block counts


def test_an_impossible_model_is_refused(tmp_path) -> None:
    options = Namespace(shape="tiny", blocks=3, device="cpu")
    with pytest.raises(InputError, match="has 2 blocks"):
        model.run(options)
    options = Namespace(shape="tiny", blocks=2, device="cpu", document_length=-5)
    with pytest.raises(InputError, match="--document-length -5: give tokens"):
        model.run(options)


# The data path


def test_a_random_store_is_a_store(tmp_path) -> None:
    store = data.write_random_store(tmp_path / "store", 1e-4, 64, 70_000, 0)
    for shard in store.shards:
        store.verify_shard(shard)
    shares = [source.num_rows / len(store) for source in store.sources]
    assert shares == pytest.approx([0.7, 0.25, 0.05], abs=1 / len(store))
    rows = store.rows(range(len(store)))
    assert 2**16 < int(rows.ids_NT.max()) < 70_000
    assert rows.is_joined
    with pytest.raises(InputError, match="room for 3 rows"):
        data.write_random_store(tmp_path / "small", 1e-6, 64, 70_000, 0)


def test_the_data_benchmark_reads_and_tokenises(tmp_path) -> None:
    words = ["data", "--store-gb", "0.0001", "--length", "64", "--batch", "16", "--seconds", "0.01"]
    assert bench.main([*words, "--workdir", str(tmp_path), "--out", str(tmp_path / "d.json")]) == 0
    found = json.loads((tmp_path / "d.json").read_text())
    assert str(tmp_path) not in json.dumps({**found, "command": ""})
    figures = found["figures"]
    for name in ("cold", "cached"):
        part = figures[name]
        assert part["num_rows"] % 16 == 0
        assert part["tokens_per_s"] == pytest.approx(64 * part["num_rows"] / part["seconds"])
        assert part["ratio"] == pytest.approx(part["tokens_per_s"] / (8 * 6800))
    assert figures["tokenising"]["tokens_per_s"] > 0
    assert not (tmp_path / "data-store").exists()
