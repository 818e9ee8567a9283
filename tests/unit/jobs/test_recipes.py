"""Recipes of SparseML and llm-compressor, in the forms in which they were published, as options."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from conf.options.distill import DistillConfig
from conf.options.prune import PruneConfig
from conf.options.quantize import QuantizeConfig
from conf.schema import Config
from jobs.cli.compose import load_config
from jobs.cli.recipe import NAME, read_recipe
from jobs.cli.recipe.names import globs_of, regex_of
from jobs.runs.recipes import write_recipes
from jobs.stages import stage
from sparsify.errors import InputError
from tests.conftest import message

SPARSE_LLAMA = r"""
sparsity_stage:
  run_type: oneshot
  sparsity_modifiers:
    SparseGPTModifier:
      sparsity: 0.5
      block_size: 128
      sequential_update: true
      quantize: false
      percdamp: 0.01
      mask_structure: "2:4"
      targets: ["re:model.layers.\\d+$"]
finetuning_stage:
  run_type: train
  finetuning_modifiers:
    ConstantPruningModifier:
      targets:
        - re:.*q_proj.weight
        - re:.*k_proj.weight
        - re:.*v_proj.weight
        - re:.*o_proj.weight
        - re:.*gate_proj.weight
        - re:.*up_proj.weight
        - re:.*down_proj.weight
      start: 0
quantization_stage:
  run_type: oneshot
  quantization_modifiers:
    GPTQModifier:
      sequential_update: false
      ignore: ["lm_head", LlamaRotaryEmbedding, "re:.*layers.0.mlp.*"]
      config_groups:
        group_0:
          weights: {num_bits: 4, type: "int", symmetric: true, strategy: "channel"}
          targets: ["Linear"]
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def options(folder: Path, text: str) -> dict[str, Any]:
    return read_recipe(write(folder, text)).options


def one(name: str, args: str, run_type: str | None = None) -> str:
    """A recipe of one modifier, in a stage."""
    told = "" if run_type is None else f"  run_type: {run_type}\n"
    return f"test_stage:\n{told}  test_modifiers:\n    {name}:\n      {args}\n"


def test_three_stages_of_the_llama_recipes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, SPARSE_LLAMA)
    recipe = read_recipe(path)
    assert recipe.stages == ["prune", "distill", "quantize"]
    assert recipe.options == {
        "prune.method": "sparsegpt", "prune.pattern": "2:4", "prune.block_size": 128,
        "prune.damping": 0.01, "prune.order": "block", "distill.moving_share": 0.0,
        "quantize.method": "gptq", "quantize.scheme": "int4", "quantize.group_size": -1,
        "quantize.skip": ["*layers?0?mlp*"],
    }  # fmt: skip
    (warning,) = recipe.warnings
    assert warning == (
        "line 30: GPTQModifier.sequential_update=False is left out: blocks are quantised one after "
        "another"
    )
    config = load_config("prune", [f"run.recipe={path}", "prune.damping=0.05", "model.path=x"])
    assert config.stages == ["prune", "distill", "evaluate", "quantize", "export", "report"]
    assert (config.prune.method, config.prune.damping) == ("sparsegpt", 0.05)
    assert config.quantize.skip == ["*layers?0?mlp*"] and config.quantize.group_size == -1
    assert capsys.readouterr().err == f"warning: recipe.yaml: {warning}\n"
    config = load_config("quantize", [f"run.recipe={path}", "run.from=x"])
    assert config.quantize.method == "gptq" and config.prune.method == "twofour"
    said = capsys.readouterr().err.splitlines()
    assert any("prune.method=sparsegpt is left out: jobs.quantize has no" in line for line in said)
    assert all(line.startswith("warning: recipe.yaml: ") for line in said)


def test_flat_recipes_with_tags_and_front_matter(tmp_path: Path) -> None:
    """The CNN and BERT era: a list of tags at the top, epochs, 8e-5 that YAML takes for text."""
    recipe = read_recipe(
        write(
            tmp_path,
            "---\nversion: 1.1.0\nnum_epochs: 8\n"
            "training_modifiers:\n"
            "  - !EpochRangeModifier\n      start_epoch: 0.0\n      end_epoch: 8.0\n"
            "  - !LearningRateFunctionModifier\n      lr_func: linear\n      init_lr: 8e-5\n"
            "      final_lr: 8e-6\n      start_epoch: 0.0\n      end_epoch: 8.0\n"
            "pruning_modifiers:\n  - !ConstantPruningModifier\n      params: __ALL_PRUNABLE__\n"
            "distillation_modifiers:\n  - !DistillationModifier\n     hardness: 0.75\n"
            "     temperature: 2.0\n     distill_output_keys: [logits]\n---\n# About it\n",
        )
    )
    assert recipe.options == {
        "distill.learning_rate": 8e-5, "distill.min_learning_rate_share": pytest.approx(0.1),
        "distill.moving_share": 0.0, "distill.kl_weight": 0.75, "distill.ce_weight": 0.25,
        "distill.temperature": 2.0,
    }  # fmt: skip
    assert recipe.stages == ["distill"]
    said = "\n".join(recipe.warnings)
    for words in (
        "line 2: version is left out", "line 3: num_epochs",
        "EpochRangeModifier.end_epoch=8.0 is left out: give the length of training with "
        "distill.num_tokens",
        "line 13: LearningRateFunctionModifier.end_epoch", "distill_output_keys",
    ):  # fmt: skip
        assert words in said, (words, said)


@pytest.mark.parametrize(
    ("structure", "share", "pattern"),
    [("2:4", "0.5", "2:4"), ("1:4", "0.25", "3:4"), ("4:8", "0.5", "4:8"), ("3:4", "0.75", "1:4"),
     ("0:0", "0.6", "unstructured:0.6")],
)  # fmt: skip
def test_their_n_counts_the_pruned(
    tmp_path: Path, structure: str, share: str, pattern: str
) -> None:
    found = options(
        tmp_path,
        one("WandaPruningModifier", f'{{sparsity: {share}, mask_structure: "{structure}"}}'),
    )
    assert found == {"prune.method": "wanda", "prune.pattern": pattern}


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ("{scheme: W4A16}", {"scheme": "int4", "group_size": 128}),
        ("{scheme: {W4A16_ASYM: [Linear]}}",
         {"scheme": "int4", "group_size": 128, "symmetric": False}),
        ("{scheme: W8A8}", {"scheme": "w8a8"}), ("{scheme: FP8_DYNAMIC}", {"scheme": "fp8"}),
        ("{scheme: W8A16, ignore: [lm_head]}", {"scheme": "int8", "group_size": -1}),
        ("{scheme: W4A16, ignore: ['re:.*(q|k)_proj$', model.layers.3.mlp.down_proj]}",
         {"scheme": "int4", "group_size": 128,
          "skip": ["*q_proj", "*k_proj", "model.layers.3.mlp.down_proj"]}),
        ("{config_groups: {g: {targets: [Linear], weights: {num_bits: 8, type: float, symmetric: "
         "true, strategy: channel}, input_activations: {num_bits: 8, type: float, strategy: token, "
         "dynamic: true}}}}", {"scheme": "fp8"}),
        ("{config_groups: {g: {targets: [Linear], weights: {num_bits: 4, group_size: 32, "
         "symmetric: false}}}, percdamp: 0.1}",
         {"scheme": "int4", "group_size": 32, "symmetric": False, "damping": 0.1}),
        ("{scheme: W4A16, targets: ['re:.*gate_proj', 're:.*up_proj', 're:.*down_proj']}",
         {"scheme": "int4", "group_size": 128,
          "skip": ["*.q_proj", "*.k_proj", "*.v_proj", "*.o_proj"]}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["GPTQModifier", "QuantizationModifier"])
def test_schemes(tmp_path: Path, name: str, args: str, expected: dict[str, Any]) -> None:
    found = options(tmp_path, one(name, args))
    method = "gptq" if name == "GPTQModifier" else "rtn"
    assert found == {"quantize.method": method, **{f"quantize.{k}": v for k, v in expected.items()}}


def test_terms_of_distillation_add_up(tmp_path: Path) -> None:
    text = (
        "a_stage:\n  run_type: train\n  x_modifiers:\n    OutputDistillationModifier:\n"
        "      {comparison: square_head, orig_scale: 0.5, distill_scale: 2,\n"
        '       targets: ["re:model.layers.\\\\d+$"]}\n'
    )
    expected = {"distill.square_head_weight": 2.0, "distill.ce_weight": 0.5}
    assert options(tmp_path, text) == {**expected, "distill.kl_weight": 0.0}
    text += "  y_modifiers:\n    OutputDistillationModifier: {distill_scale: 3, orig_scale: 0.5}\n"
    assert options(tmp_path, text) == {**expected, "distill.kl_weight": 3.0}


def pruning(args: str, run_type: str | None = None) -> str:
    return one("SparseGPTModifier", args, run_type)


def gptq(args: str) -> str:
    return one("GPTQModifier", args)


def output(args: str) -> str:
    return one("OutputDistillationModifier", args)


REFUSED = [
    (one("SmoothQuantModifier", "{smoothing_strength: 0.8}"), "line 3: SmoothQuantModifier: it"),
    (one("AWQModifier", "{duo_scaling: true}"), "AWQModifier: it moves"),
    (one("GMPruningModifier", "{init_sparsity: 0.05}"), "it prunes step by step"),
    (one("SparsegptModifier", "{sparsity: 0.5}"), r"did you mean SparseGPTModifier\?"),
    (pruning("{sparsity: 0.5, dampfrac: 1}"),
     r"line 4: SparseGPTModifier\.dampfrac: unknown key \(did you mean dampening_frac\?\)"),
    (pruning("{sparsity: [0.5, 0.6]}"), "is a list, one for each layer"),
    (pruning("{sparsity: 0.7, mask_structure: '2:4'}"), "prunes 2 of every 4: 0.5"),
    (pruning("{sparsity: half}"), "is 'half', not a number"),
    (pruning("{mask_structure: '4:4'}"), "prunes nothing or all"),
    (pruning("{sparsity: 0.5, sparsity_profile: owl, owl_m: 5}"), "sparsity_profile"),
    (pruning("{sparsity: 0.5, ignore: ['re:.*layers\\\\.\\\\d+\\\\.mlp']}"),
     r"no glob says what re:.*give prune\.skip"),
    (pruning("{sparsity: 0.5, targets: ['re:.*fc1']}"), "neither all linear layers"),
    (pruning("{sparsity: 0.5}", "train"), "belongs to run_type: oneshot"),
    (pruning("{sparsity: 0.5}", "later"), "run_type 'later' of test_stage"),
    (one("MagnitudePruningModifier", "{init_sparsity: 0.1, final_sparsity: 0.5}"), "step by step"),
    (one("ConstantPruningModifier", "{start: 1.5}"), "held from the first step"),
    (output("{comparison: mse}"), "kl_divergence and square_head"),
    (output("{comparison: square_head, targets: ['re:.*layers.3$']}"),
     "square_head compares all blocks"),
    (output("{transforms: softmax}"), "compared as they are"),
    (one("LearningRateFunctionModifier", "{lr_func: cyclic_linear, init_lr: 1}"), "cycles are not"),
    (gptq("{scheme: NVFP4}"), "NVFP4.*no such scheme here"),
    (gptq("{scheme: FP8}"), "have to be calibrated.*use FP8_DYNAMIC"),
    (gptq("{ignore: [lm_head]}"), "one of the two"),
    (gptq("{scheme: W4A16, actorder: group}"), "columns stay in their order"),
    (gptq("{scheme: W4A16, kv_cache_scheme: {num_bits: 8}}"), "cache of keys"),
    (gptq("{config_groups: {a: {weights: {num_bits: 4}}, b: {}}}"), "one group for"),
    (gptq("{config_groups: {a: {weights: {num_bits: 8, strategy: channel}, "
         "input_activations: {num_bits: 8, type: int, dynamic: false}}}}"), "to be calibrated"),
    (gptq("{config_groups: {a: {weights: {num_bits: 3, strategy: channel}}}}"),
     "weights of 3 bits"),
    (gptq("{config_groups: {a: {weights: {num_bits: 8, strategy: tensor}}}}"),
     "strategy='tensor'"),
    ("lr: 3\nx_modifiers:\n  - !SetLearningRateModifier\n      learning_rate: eval(lr / 2)\n",
     r"line 4: learning_rate is 'eval\(lr / 2\)', which is to be evaluated"),
    ("a_stage:\n  x_modifiers:\n    GPTQModifier: {scheme: W4A16}\n    GPTQModifier: {}\n",
     "line 4: GPTQModifier is there twice"),
    ("x_modifiers: !!python/object/apply:os.system ['true']\n", "could not determine"),
    ("- a\n- b\n", "is no recipe"), ("a: 1\n", "has no modifiers"), ("a: [\n", "while parsing"),
    ("x_modifiers: 3\n", "is 3, not a mapping"),
    ("a_stage: {x_modifiers: {GPTQModifier: {scheme: W4A16}}}\n"
     "b_stage: {x_modifiers: {SparseGPTModifier: {sparsity: 0.5}}}\n", "make it two recipes"),
    ("a_stage: {x_modifiers: {SparseGPTModifier: {sparsity: 0.5}}}\n"
     "b_stage: {x_modifiers: {ConstantPruningModifier: {}}}\n"
     "c_stage: {x_modifiers: {SparseGPTModifier: {sparsity: 0.5}}}\n", "prune comes again"),
    ("a_stage: {x_modifiers: {SparseGPTModifier: {sparsity: 0.5}}}\n"
     "b_stage: {x_modifiers: {WandaPruningModifier: {sparsity: 0.5}}}\n",
     "prune.method=sparsegpt before"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "said"), REFUSED)
def test_what_has_no_counterpart_is_refused_by_name(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        read_recipe(write(tmp_path, text))
    assert message(caught).startswith(f"run.recipe={tmp_path / 'recipe.yaml'}: ")


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such file"):
        load_config("prune", [f"run.recipe={tmp_path / 'no.yaml'}"])
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is no text"):
        read_recipe(tmp_path / "bytes")
    path = write(tmp_path, one("GPTQModifier", "{scheme: W4A16}"))
    with pytest.raises(InputError, match="is given 2 times"):
        load_config("prune", [f"run.recipe={path}", f"run.recipe={path}"])
    with pytest.raises(InputError, match=r"run\.from: is required"):  # nothing makes a sparse model
        load_config("prune", [f"run.recipe={path}"])


def test_what_only_tuned_speed_is_left_out_with_a_line(tmp_path: Path) -> None:
    recipe = read_recipe(
        write(
            tmp_path,
            one("GPTQModifier", "{scheme: W4A16, sequential_update: true, actorder: static, "
                                "offload_hessians: true, weight_observer: mse}"),
        )
    )  # fmt: skip
    assert recipe.options == {
        "quantize.method": "gptq", "quantize.scheme": "int4", "quantize.group_size": 128,
    }  # fmt: skip
    said = [line.partition(" is left out: ")[0].partition(".")[2] for line in recipe.warnings]
    assert sorted(said) == [
        "actorder='static'", "offload_hessians=True", "sequential_update=True",
        "weight_observer='mse'",
    ]  # fmt: skip


@given(glob=st.text("ab.*?_1", min_size=1, max_size=8))
def test_globs_become_patterns_and_come_back(glob: str) -> None:
    said = regex_of(glob)
    if said != glob:
        assert globs_of(said.removeprefix("re:"), "") == [glob]


PRUNES = st.builds(
    PruneConfig,
    method=st.sampled_from(["twofour", "sparsegpt", "wanda", "magnitude", "admm"]),
    pattern=st.sampled_from(["2:4", "1:4", "4:8", "unstructured:0.6"]),
    block_size=st.sampled_from([64, 128]), damping=st.sampled_from([0.01, 0.1]),
    skip=st.sampled_from([[], ["*.down_proj"], ["*layers.?.mlp*", "model.layers.0.x"]]),
    order=st.sampled_from(["auto", "block"]), fisher=st.booleans(),
)  # fmt: skip
QUANTIZES = st.builds(
    QuantizeConfig,
    method=st.sampled_from(["gptq", "rtn"]), damping=st.sampled_from([0.01, 0.05]),
    scheme=st.sampled_from(["int4", "int8", "nf4", "fp8", "w8a8"]),
    group_size=st.sampled_from([None, -1, 64]), skip=st.sampled_from([[], ["*.o_proj"]]),
    num_samples=st.sampled_from([256, 32]),
).filter(lambda q: q.group_size != 64 or q.scheme in ("int4", "int8", "nf4"))  # fmt: skip
DISTILLS = st.builds(
    DistillConfig, learning_rate=st.sampled_from([1e-3, 6e-5]), ce_weight=st.sampled_from([0.0, 1]),
    square_head_weight=st.sampled_from([0.0, 2.0]),
    schedule=st.sampled_from([[], ["ce_weight:0@0.5"]]),
)  # fmt: skip


@settings(deadline=None, max_examples=15, phases=[Phase.generate])
@given(prune=PRUNES, distill=DISTILLS, quantize=QUANTIZES)
def test_the_recipe_of_a_model_reads_back_to_its_options(
    tmp_path_factory: pytest.TempPathFactory, prune: PruneConfig, distill: DistillConfig,
    quantize: QuantizeConfig,
) -> None:  # fmt: skip
    """Through all stages that make models, each beginning with the recipe of the one before."""
    folder = tmp_path_factory.mktemp("run")
    config = replace(Config(), prune=prune, distill=distill, quantize=quantize)
    source = folder
    for name, metrics, place in (
        ("prune", {"methods": [prune.method]}, prune.method), ("distill", {}, "model"),
        ("quantize", {}, "packed"),
    ):  # fmt: skip
        models = SimpleNamespace(sparse=lambda _, source=source: source)
        context: Any = SimpleNamespace(config=config, models=models, warnings=[])
        (folder / name / place).mkdir(parents=True)
        write_recipes(stage(name), context, folder / name, metrics)
        source = folder / name / place
        assert not context.warnings
    recipe = read_recipe(source / NAME)
    assert recipe.stages == ["prune", "distill", "quantize"] and not recipe.warnings
    for group, expected in (("prune", prune), ("distill", distill), ("quantize", quantize)):
        found = {
            key.partition(".")[2]: value
            for key, value in recipe.options.items() if key.startswith(f"{group}.")
        }  # fmt: skip
        assert type(expected)(**found) == expected
    models = SimpleNamespace(sparse=lambda _: source, made={"quantize": {"packed": source}})
    context = SimpleNamespace(config=config, models=models, warnings=[])
    for name in ("sparse", "int4-packed"):
        (folder / "export" / name).mkdir(parents=True)
        (folder / "export" / name / "config.json").write_text("{}")
    write_recipes(stage("export"), context, folder / "export", {})
    text = (source / NAME).read_text()
    assert (folder / "export/int4-packed" / NAME).read_text() == text


def test_a_source_with_a_recipe_that_cannot_be_read(tmp_path: Path) -> None:
    """A published model may bring one of other modifiers: a warning, and this stage alone."""
    write(tmp_path, one("SmoothQuantModifier", "{smoothing_strength: 0.8}"))
    models = SimpleNamespace(sparse=lambda _: tmp_path)
    context: Any = SimpleNamespace(config=Config(), models=models, warnings=[])
    (tmp_path / "packed").mkdir()
    write_recipes(stage("quantize"), context, tmp_path, {})
    (said,) = context.warnings
    assert "SmoothQuantModifier" in said and said.endswith("begins with quantize")
    assert read_recipe(tmp_path / "packed" / NAME).stages == ["quantize"]


def test_llm_compressor_can_read_what_it_has_modifiers_for(tmp_path: Path) -> None:
    """Its form to the letter where the method is one of its own: only stages and modifiers at the
    top, which it reads, and a key of ours, which it passes over."""
    prune = PruneConfig(method="sparsegpt", skip=["*.down_proj"])
    (tmp_path / "sparsegpt").mkdir()
    context: Any = SimpleNamespace(config=replace(Config(), prune=prune), warnings=[])
    write_recipes(stage("prune"), context, tmp_path, {"methods": ["sparsegpt"]})
    text = (tmp_path / "sparsegpt" / NAME).read_text()
    body = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    assert body == (
        "default_stage:\n  default_modifiers:\n    SparseGPTModifier:\n      sparsity: 0.5\n"
        "      mask_structure: '2:4'\n      block_size: 128\n      dampening_frac: 0.01\n"
        "      targets:\n      - Linear\n      ignore:\n      - re:.*lm_head\n"
        "      - re:.*\\.down_proj$\ntwofour:\n  stages:\n  - prune"
    )
