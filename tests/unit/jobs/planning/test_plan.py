"""The command `plan`: what fits, the preflight's word, calibration, budget and simulation."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

import jobs.stages
from conf.schema import Config, PlanJobConfig
from jobs import plan as command
from jobs.benchmarks.support.families import family_config
from jobs.cli.compose import load_config
from jobs.planning.budget import make_budget
from jobs.planning.calibration import read_calibration
from jobs.planning.choices import Recovery
from jobs.planning.layouts import machine_of, training_of
from jobs.planning.models import shape_of
from jobs.planning.preflight import check_pruning, check_recovery
from jobs.planning.processor import processor_rates
from jobs.planning.run import make_plan, recovery_of
from jobs.planning.simulation import simulate_sizes
from jobs.reporting import plan as text
from jobs.runs.models import Models
from sparsify.costs.layout import Training
from sparsify.costs.scaling import LAWS, cheapest_small_model
from sparsify.costs.seconds import Rates, step_seconds
from sparsify.errors import InputError

LLAMA = "meta-llama/Llama-3.1-8B"


def plan_config(*words: str) -> PlanJobConfig:
    config: PlanJobConfig = load_config("plan", [f"model.path={LLAMA}", "+cluster=h100x8", *words])
    return config


def unused(command: str) -> Config:
    raise AssertionError(command)


def test_quantising_goes_block_by_block_and_waits_on_the_host_where_it_has_to() -> None:
    """70B on one card that could not hold the model."""
    words = ["model.path=llama-2-70b", "cluster.num_workers=1"]
    found = make_plan(plan_config(*words), unused)["whole"]["quantize"]
    assert found["fits"]
    assert found["bytes"] < 40e9 < 140e9
    assert found["activations"] == "host"
    assert found["host_bytes"] == pytest.approx(512 * 2048 * 8192 * 2 * 2)
    asked = make_plan(plan_config(*words, "quantize.activations=disk"), unused)
    assert asked["whole"]["quantize"]["activations"] == "disk"


def test_the_plan_has_every_part_and_reads_well() -> None:
    found = make_plan(plan_config("plan.price=2"), unused)
    json.dumps(found, allow_nan=False)
    assert set(found["time"]["stages_s"]) == {"prune", "distill", "evaluate", "quantize", "export"}
    assert found["time"]["money"] == pytest.approx(2 * found["time"]["gpu_hours"])
    assert found["recovery"]["asked"]["fits"]
    assert found["recovery"]["by_stage"][3]["parts"]["student"] * 8 == pytest.approx(16.06e9, 0.01)
    lines = text.plan_lines(found)
    told = [line for line in lines if line.startswith(("evaluate:", "quantize:"))]
    ways = [line.rpartition(", ")[2] for line in told]
    assert ways == ["models whole", "block by block"]
    told = "\n".join(lines)
    for word in ("masters", "Hessians", "GPU-hours", "by Young", "2:4 packed", "QLoRA", "network"):
        assert word in told
    assert max(map(len, lines)) <= 80


def test_what_the_choice_says_fits_does() -> None:
    config = plan_config("data.sequence_length=8192")
    machine, (shape, _) = machine_of(config, 0.95), shape_of(LLAMA)
    best = recovery_of(config, machine, shape).cheapest()
    assert best is not None
    assert best.memory.total <= machine.memory_bytes
    again = plan_config("data.sequence_length=8192", *best.overrides())
    check_recovery(again, Path(LLAMA))
    chosen = recovery_of(again, machine, shape)
    assert chosen.choice().memory.total == pytest.approx(best.memory.total)
    fitting = [choice for choice in chosen.every() if chosen.fits(choice)]
    assert min(choice.step_s for choice in fitting) >= best.step_s / 1.01


def test_elementwise_work_is_recomputed_where_all_does_not_fit() -> None:
    """ZeRO-2 with the teacher split, as the preset has it: everything kept is too much, and the
    preset is as good as the best."""
    config = plan_config("data.sequence_length=8192", "distill.micro_batch_size=1")
    machine, (shape, _) = machine_of(config, 0.95), shape_of(LLAMA)
    recovery = recovery_of(config, machine, shape)
    kept = recovery.choice(recompute_share=0.0)
    third = recovery.choice(recompute_share=0.34, recompute="whole")
    asked = recovery.choice()
    assert not recovery.fits(kept)
    assert recovery.fits(asked)
    assert recovery.fits(third)
    assert kept.step_s < asked.step_s < 1.01 * kept.step_s < third.step_s
    best = recovery.cheapest()
    assert best is not None
    assert best.overrides() == []


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["data.sequence_length=8192"], r"use distill.micro_batch_size=1 \(7"),
        (
            ["data.sequence_length=8192", "distill.recompute_share=0"],
            "use distill.zero_stage=3 .*distill.micro_batch_size=1",
        ),
        (["model.path=Llama-2-70B"], "needs .* GB on every GPU"),
        (["cluster.card=rtx4090", "cluster.num_workers=1", "cluster.num_nodes=1"], "offloading"),
    ],
)
def test_a_run_that_cannot_fit_is_refused_with_the_way_out(words: list[str], reason: str) -> None:
    config = plan_config(*words)
    with pytest.raises(InputError, match=reason) as caught:
        check_recovery(config, Path(config.model.path))
    assert "\n" not in str(caught.value)


def test_pruning_that_cannot_fit_is_refused_with_the_way_out() -> None:
    fits = plan_config("model.path=Llama-2-70B")
    check_pruning(fits, Path("Llama-2-70B"))
    config = plan_config(
        "model.path=Llama-2-70B", "cluster.card=rtx4090", "prune.batch_size=64",
    )  # fmt: skip
    with pytest.raises(InputError, match=r"use .*prune.batch_size=\d+"):
        check_pruning(config, Path("Llama-2-70B"))


def test_nobody_looks_where_no_card_is_named() -> None:
    config = plan_config("cluster.card=null", "data.sequence_length=8192")
    check_recovery(config, Path("nowhere"))
    check_pruning(config, Path("nowhere"))
    with pytest.raises(InputError, match=r"cluster.card: is not known"):
        make_plan(config, unused)


@pytest.mark.parametrize("stage", ["prune", "distill"])
def test_the_stage_itself_refuses(stage: str, tmp_path: Path) -> None:
    facts = json.loads(Path("sparsify/costs/published/llama-2-70b.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(facts), encoding="utf-8")
    config = plan_config(f"model.path={tmp_path}", "cluster.card=rtx4090", "prune.batch_size=64")
    check = jobs.stages.stage(stage).check
    assert check is not None
    with pytest.raises(InputError, match=rf"^{stage}: .*GeForce RTX 4090 24 GB has 24.0 to give"):
        check(config, Models(tmp_path, ()))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe", "llama4_text", "dbrx"])
def test_mixtures_are_planned_and_looked_at_before_they_start(
    family: str, capsys: Any, tmp_path: Path
) -> None:
    family_config(family).save_pretrained(tmp_path)
    words = [f"model.path={tmp_path}", "cluster.card=h100", "data.sequence_length=64"]
    found = make_plan(plan_config(*words), unused)
    assert found["recovery"]["asked"]["fits"] and found["pruning"]
    assert found["recovery"]["step"]["parts_s"]["launches"] > 0
    check_recovery(plan_config(*words), tmp_path)
    assert not capsys.readouterr().err


def test_a_mixture_that_cannot_fit_is_refused_with_the_way_out(tmp_path: Path) -> None:
    """Of 9.7 G parameters: 39 GB for both models alone."""
    sizes = {"hidden_size": 8192, "intermediate_size": 32768, "num_local_experts": 4}
    family_config("mixtral", **sizes).save_pretrained(tmp_path)
    words = [f"model.path={tmp_path}", "cluster.card=a100-40", "data.sequence_length=64"]
    with pytest.raises(InputError, match=r"needs .* GB on every GPU .*; use distill.zero_stage=3"):
        check_recovery(plan_config(*words), tmp_path)


def test_a_mixture_that_cannot_be_followed_is_named_with_the_reason(
    capsys: Any, tmp_path: Path
) -> None:
    family_config("jetmoe").save_pretrained(tmp_path)
    check_recovery(plan_config(), tmp_path)
    (line,) = capsys.readouterr().err.splitlines()
    assert "nobody looks" in line and "JetMoeForCausalLM" in line and "meta" in line
    with pytest.raises(InputError, match=r"JetMoe.*without weights \(.*meta"):
        make_plan(plan_config(f"model.path={tmp_path}"), unused)


def test_what_cannot_be_counted_is_said_and_not_refused(capsys: Any, tmp_path: Path) -> None:
    facts = {"model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 100}
    (tmp_path / "config.json").write_text(json.dumps(facts), encoding="utf-8")
    check_recovery(plan_config(), tmp_path)
    check_pruning(plan_config(), tmp_path)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert all("nobody looks whether it fits the cards" in line for line in said)


def test_a_card_or_model_that_is_not_known_is_one_line() -> None:
    with pytest.raises(InputError, match="did you mean h100"):
        make_plan(plan_config("cluster.card=h101"), unused)
    with pytest.raises(InputError, match=r"config\.json, which is all that is needed"):
        make_plan(plan_config("model.path=/nowhere/model"), unused)


def test_config_json_alone_is_enough(tmp_path: Path) -> None:
    facts = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 176,
             "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(facts), encoding="utf-8")
    shape, note = shape_of(str(tmp_path))
    assert (shape.num_blocks, note) == (2, None)


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"model_type": "bert"}, "no causal language model"),
        ({"model_type": "t5"}, "no causal language model"),
        ({"model_type": "nonsense"}, "not known to the installed transformers"),
        ({}, "no 'model_type'"),
        ([], "no 'model_type'"),
        ({"model_type": "llama", "hidden_size": "x"}, "not a usable configuration"),
        ({"model_type": "llama", "hidden_size": -4}, "not a usable configuration"),
        ({"model_type": "llama", "num_hidden_layers": 10**6}, "num_hidden_layers=1000000: must be"),
        ({"model_type": "llama", "num_hidden_layers": 0}, "num_hidden_layers=0: must be"),
        ({"model_type": "llama", "hidden_act": "none such"}, "no model can be built of it"),
    ],
)
def test_a_config_that_is_none_is_one_line(facts: Any, reason: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(facts), encoding="utf-8")
    with pytest.raises(InputError, match=reason) as caught:
        shape_of(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_name_of_the_hub_is_read_from_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    name, commit = "org/planned-by-name", "1" * 40
    with pytest.raises(InputError, match=r"none of that name in the Hub's cache"):
        shape_of(name)
    repository = tmp_path / "models--org--planned-by-name"
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    facts = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 176,
             "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 100}  # fmt: skip
    path = repository / "snapshots" / commit / "config.json"
    path.write_text(json.dumps(facts), encoding="utf-8")
    for text_of in (name, f"{name}@{commit}"):
        shape, note = shape_of(text_of)
        assert shape.num_blocks == 3
        assert "Hub's cache" in str(note)


@pytest.mark.parametrize("cluster", ["a100x8", "h100x8", "h100x32", "h200x8", "b200x8"])
@pytest.mark.parametrize("recipe", [[], ["recipe=sparse-llama-3.1-8b"]])
def test_presets_fit_their_own_cards(cluster: str, recipe: list[str]) -> None:
    config = load_config("plan", [f"model.path={LLAMA}", f"+cluster={cluster}", *recipe])
    check_pruning(config, Path(LLAMA))
    check_recovery(config, Path(LLAMA))
    assert all(use["fits"] for use in make_plan(config, unused)["whole"].values())


def test_a_price_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match=r"plan\.price=0.*more than 0"):
        plan_config("plan.price=0")


def test_the_head_on_a_cpu_is_in_float32_whatever_bf16_reaches() -> None:
    slow = Rates(1e11, 1e10, 1e10, 1e9, 1e9, float32=1e11, overlaps=False)
    shape, _ = shape_of("embedded")
    setup = Training(uses_gpu=False, sequence_length=128)
    steps = [
        step_seconds(shape, shape, setup, rates) for rates in (replace(slow, products=9e11), slow)
    ]
    assert steps[1]["products"] == pytest.approx(9 * steps[0]["products"])
    assert steps[0]["head"] == steps[1]["head"]


def test_times_say_where_they_come_from() -> None:
    said = "\n".join(text.plan_lines(make_plan(plan_config(), unused)))
    assert "times    come from data sheets" in said
    config = load_config("plan", ["model.path=embedded"])
    said = " ".join("\n".join(text.plan_lines(make_plan(config, unused))).split())
    reached = processor_rates(4).products / 1e9
    assert f"did just now ({reached:.0f} Gflop/s of float32 products)" in said


def write_run(folder: Path, words: str, tokens_per_s: float) -> None:
    stage = folder / "distill"
    stage.mkdir(parents=True)
    record = {"command": f"python -m jobs.prune {words}", "metrics": {"tokens_per_s": tokens_per_s}}
    (stage / "record.json").write_text(json.dumps(record), encoding="utf-8")


def test_records_correct_the_times(tmp_path: Path) -> None:
    config = plan_config()
    machine, (shape, _) = machine_of(config, 1.0), shape_of(LLAMA)
    setup = training_of(config, machine)
    recovery = Recovery(shape, shape, setup, machine, machine.rates(2))
    planned = 768 * 2048 / recovery.choice().step_s
    write_run(tmp_path / "a", f"model.path={LLAMA} +cluster=h100x8", planned / 2)
    write_run(tmp_path / "b", f"model.path={LLAMA} +cluster=h100x8", planned / 0.5)

    def load(line: str) -> Config:
        return command._config_of(line)

    names = [str(tmp_path / "a"), str(tmp_path / "b")]
    found = read_calibration(names, machine, load)
    assert found.ratios["distill"] == pytest.approx([2.0, 0.5])
    assert found.factor("distill") == pytest.approx(1.0)
    assert found.factor("prune") == 1.0
    slow = make_plan(plan_config(f"plan.records=[{names[0]}]"), load)
    assert "1 run took 2.00 times" in "\n".join(text.plan_lines(slow))
    write_run(tmp_path / "c", f"model.path={LLAMA} +cluster=h100x8", planned / 30)
    odd = make_plan(plan_config(f"plan.records=[{tmp_path / 'c'}]"), load)
    assert "too short" in "\n".join(text.plan_lines(odd))
    quick = make_plan(plan_config(), load)
    for plan in (slow, quick):
        assert plan["recovery"]["step"]["step_s"] > 0
    ratio = slow["recovery"]["step"]["step_s"] / quick["recovery"]["step"]["step_s"]
    assert ratio == pytest.approx(2.0)
    with pytest.raises(InputError, match="no such folder or file"):
        read_calibration([str(tmp_path / "none")], machine, load)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no finished prune or distill stage"):
        read_calibration([str(tmp_path / "empty")], machine, load)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"command": f"python -m jobs.prune model.path={LLAMA} +cluster=h100x8"}, "no 'metrics'"),
        ({"metrics": {}}, "no 'command'"),
        ({"command": f"python -m jobs.prune model.path={LLAMA} +cluster=h100x8", "metrics": {
            "tokens_per_s": 0}}, "division by zero"),
        ({"command": f"python -m jobs.prune model.path={LLAMA} +cluster=a100x8", "metrics": {
            "tokens_per_s": 9}}, "it ran on A100 SXM 80 GB, and this plans for H100 SXM 80 GB"),
        ({"command": "rm -rf /", "metrics": {}}, "none of this project's"),
        ({"command": "python -m jobs.plan model.path=x", "metrics": {}}, "neither prunes nor"),
    ],
)  # fmt: skip
def test_what_is_amiss_with_a_record_is_said(
    record: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    (tmp_path / "distill").mkdir()
    (tmp_path / "distill" / "record.json").write_text(json.dumps(record), encoding="utf-8")
    machine = machine_of(plan_config(), 1.0)
    found = read_calibration([str(tmp_path)], machine, command._config_of)
    assert found.ratios == {}
    (said,) = found.left_out
    assert reason in said


@pytest.mark.parametrize(
    "content",
    ["[1]", "{", '{"benchmark": "plan"}',
     '{"benchmark": "plan", "figures": {"runs": [{"kind": "prune"}]}}',
     '{"benchmark": "plan", "figures": {"runs": [{"kind": "x", "measured_s": 0, "base_s": 1}]}}'],
)  # fmt: skip
def test_a_file_that_is_no_record_is_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text(content, encoding="utf-8")
    machine = machine_of(plan_config(), 1.0)
    with pytest.raises(InputError, match=r"plan\.records=.*(no record|cannot be read)") as caught:
        read_calibration([str(tmp_path / "record.json")], machine, unused)
    assert "\n" not in str(caught.value)


def test_scaling_laws_have_their_published_optimum() -> None:
    # Hoffmann et al., table A.3, approach 3: Gopher's budget of 5.76e23 takes 40 B parameters.
    size, tokens = LAWS[0].optimal(5.76e23)
    assert size == pytest.approx(40e9, rel=0.02)  # 32 B with the exponents as printed
    assert 6 * size * tokens == pytest.approx(5.76e23)
    for law in LAWS:
        size, tokens = law.optimal(1e23)
        best = law.loss(size, tokens)
        for factor in (0.7, 1.4):
            assert law.loss(size * factor, tokens / factor) > best
        assert law.tokens_for(size, best) == pytest.approx(tokens, rel=1e-6)


def test_without_serving_the_cheapest_model_is_the_compute_optimal_one() -> None:
    law = LAWS[1]
    size, tokens = law.optimal(1e22)
    found = cheapest_small_model(
        law, law.loss(size, tokens), 100 * size, lambda work: work, lambda size: 0.0
    )
    assert found.num_parameters == pytest.approx(size, rel=0.02)
    assert found.training == pytest.approx(1e22, rel=1e-3)
    served = cheapest_small_model(
        law, law.loss(size, tokens), 100 * size, lambda work: work, lambda size: 1e13 * size
    )
    assert served.num_parameters < found.num_parameters  # and trained longer
    assert served.num_tokens > found.num_tokens


def test_budget_compares_at_equal_loss() -> None:
    found = make_budget(plan_config("plan.served_tokens=1e13"))
    few = make_budget(plan_config("plan.served_tokens=1e10"))
    for ways, less in zip(found["ways"], few["ways"], strict=True):
        assert ways["training_hours"] == less["training_hours"]
        assert ways["serving_hours"] == pytest.approx(1000 * less["serving_hours"])
    assert found["small"][0]["parameters"] < few["small"][0]["parameters"]
    told = "\n".join(text.budget_lines(found))
    assert max(map(len, told.splitlines())) <= 80
    assert "Hoffmann 2022" in told
    assert "Besiroglu 2024" in told
    with pytest.raises(InputError, match=r"cluster\.card"):
        make_budget(load_config("plan", ["model.path=embedded"]))


def test_simulation_covers_the_sizes_and_draws(tmp_path: Path) -> None:
    config = plan_config("plan.num_runs=10", "plan.most_gpus=64", "plan.gpu_mtbf_hours=500")
    found = simulate_sizes(config)
    rows = found["rows"]
    assert [row["gpus"] for row in rows] == [8, 16, 32, 64]
    for row in rows:
        assert row["finish_s"]["0.1"] <= row["finish_s"]["0.5"] <= row["finish_s"]["0.9"]
        assert row["work_s"] <= row["finish_s"]["0.1"]
        assert 0 < row["goodput"] <= 1
    lines = text.simulation_lines(found)
    assert max(map(len, lines)) <= 80
    assert any(line.split()[:1] == ["GPUs"] and "goodput" in line for line in lines)
    drawing = text.simulation_plot(found)
    assert drawing.startswith("<svg ")
    assert drawing.count("polyline") >= 2
    config = replace(config, plan=replace(config.plan, show="simulate", out=str(tmp_path / "out")))
    said = command.run(config)
    assert (tmp_path / "out" / "simulate.svg").read_text(encoding="utf-8") == drawing
    assert json.loads((tmp_path / "out" / "simulate.json").read_text(encoding="utf-8")) == found
    assert "written:" in said


def test_first_word_names_what_is_shown(capsys: Any) -> None:
    (line,) = (e for e in command.COMMAND.examples if e.startswith("budget"))
    assert command.words_of(shlex.split(line))[0] == "plan.show=budget"
    assert command.words_of(["model.path=x"]) == ["model.path=x"]
    assert command.words_of(["simulate", "--help"]) == ["plan.", "--help"]
