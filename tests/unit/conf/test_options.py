"""The schema's rules and the YAML files that give it values."""

from __future__ import annotations

import json
import math
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml

from cluster.stages import StagedClusterSpec
from conf.options import drop
from conf.options.curate import CurateConfig, CurateJobConfig
from conf.options.data import DataConfig
from conf.options.drop import DropConfig
from conf.options.model import ModelConfig
from conf.options.preflight import PreflightJobConfig
from conf.options.pretrain import PretrainConfig
from conf.options.run import USUAL, RunConfig
from conf.options.teach import TeachConfig, TeachJobConfig
from conf.options.tokenize import TokenizeConfig, TokenizeJobConfig
from conf.options.tracker import TrackerConfig
from conf.schema import (
    ALIASES,
    Config,
    DistillConfig,
    EvaluateConfig,
    ExportConfig,
    PruneConfig,
    QuantizeConfig,
    default_run_dir,
    to_dict,
)
from jobs.cli.command import find_command
from jobs.cli.compose import load_config
from jobs.cli.options import (
    CONF_DIR,
    JOBS,
    cluster_names,
    command_presets,
    job_options,
    presets,
)
from sparsify.errors import InputError

FROM = "run.from=runs/earlier"


def read_yaml(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def flat(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in node.items():
        nested = flat(value, f"{prefix}{key}.") if isinstance(value, dict) else None
        found |= nested if nested is not None else {prefix + key: value}
    return found


def cached(**settings: Any) -> DistillConfig:
    """A recovery from the cache `c`."""
    return DistillConfig(**{"teacher_cache": "c", **settings})


# --- what is composed

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "configs.json").read_text())
"""`prune-local` whole, other commands of the pipeline by what differs from it: option -> value"""


@pytest.mark.parametrize("name", GOLDEN)
def test_composed_config_is_the_one_of_before(name: str) -> None:
    """Held since the defaults moved from YAML into the dataclasses; options may have been added."""
    job, _, cluster = name.partition("-")
    words = [f"+cluster={cluster}"]
    words += ["run.from=runs/first"] if GOLDEN[name].get("run.from") else []
    words += ["data.train=/d"] if job == "teach" else []
    words += ["drop.num_layers=1"] if job == "drop" else []
    is_whole = job in ("curate", "preflight", "teach", "tokenize")
    expected = GOLDEN[name] if is_whole else GOLDEN["prune-local"] | GOLDEN[name]
    composed = flat(to_dict(load_config(job, words)))
    assert {key: composed.get(key, "gone") for key in expected} == expected


def test_every_command_and_cluster_is_held() -> None:
    jobs = [job for job in JOBS if job != "report"]
    assert set(GOLDEN) == {f"{j}-{c}" for j in jobs for c in cluster_names()}


@pytest.mark.parametrize("job", JOBS)
def test_help_shows_the_values_that_the_yaml_starts_from(job: str) -> None:
    words = {"teach": ["data.train=/d"], "prune": [], "drop": ["drop.num_layers=1"]}.get(
        job, [FROM]
    )
    takes_no_model = job in ("curate", "preflight", "pretrain", "tokenize")
    config = flat(to_dict(load_config(job, [] if takes_no_model else words)))
    told = {word.partition("=")[0] for word in words}
    told |= {"run.dir", "run.redo"} if job == "report" else set()
    for key, option in job_options(job).items():
        if key not in told:
            assert config[key] == option.default, key


@pytest.mark.parametrize(
    ("group", "name"),
    [
        (group, name)
        for group, names in command_presets(find_command("prune")).items()
        for name in names
        if group != "cluster"
    ],
)
def test_preset_composes_and_says_what_it_is(group: str, name: str) -> None:
    text = (CONF_DIR / group / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith("# @package _global_\n# ")
    config = load_config("prune", [f"{group}={name}"])
    assert config != Config() or name in ("embedded", "stdlib")
    if group != "recipe":
        alone = load_config("quantize", [FROM, f"{group}={name}"])
        assert (alone.model, alone.data) == (config.model, config.data)


def test_recipe_pins_more_than_the_cluster_it_names_and_the_command_line_wins() -> None:
    name = "recipe=sparse-llama-3.1-8b"
    config = load_config("prune", [name])
    assert (config.cluster.name, config.model.dtype) == ("h100x32", "bfloat16")
    distill = config.distill
    assert (distill.num_tokens, distill.batch_size, distill.ce_weight) == (13_000_000_000, 128, 1.0)
    assert (distill.kl_weight, distill.square_head_weight, distill.learning_rate) == (0, 1.0, 1e-4)
    assert load_config("prune", [name, "+cluster=h100x8"]).distill.batch_size == 128
    own = load_config("prune", [name, "+cluster=h100x8", "model.path=/m", "distill.batch_size=64"])
    assert (own.cluster.name, own.model.path, own.distill.batch_size) == ("h100x8", "/m", 64)


def test_recipe_leaves_a_command_its_one_stage() -> None:
    assert load_config("distill", [FROM, "recipe=sparsegpt-paper"]).stages == ["distill"]


def test_speed_only_options_are_left_out_of_what_decides_a_result() -> None:
    whole, deciding = flat(to_dict(Config())), flat(to_dict(Config(), deciding=True))
    assert {"distill.batch_size", "prune.damping", "quantize.scheme"} <= set(deciding)
    assert set(whole) - set(deciding) == {
        "prune.activations", "prune.attention", "prune.batch_size", "prune.checkpoint_every_blocks",
        "prune.overlap",
        "drop.batch_size", "evaluate.batch_size", "quantize.activations",
        "quantize.attention", "quantize.batch_size",
        "quantize.checkpoint_every_blocks",
        *(f"{group}.{name}" for group in ("distill", "finetune", "pretrain") for name in (
            "micro_batch_size", "checkpoint_every_steps", "attention", "zero_stage",
            "zero_hpz_size", "offload_optimizer", "compile", "recompute_share", "recompute",
            "teacher_placement", "keep_checkpoints", "milestone_every_steps", "mtbf_hours",
            "heldout_every_steps", "heldout_tokens", "time_limit_hours", "time_reserve_s",
            "hang_after_s", "pause_limit_s", "checksum_every_steps",
        )),
    }  # fmt: skip


@pytest.mark.parametrize("name", cluster_names())
def test_cluster_preset_says_what_it_is(name: str) -> None:
    cluster = load_config("prune", [f"+cluster={name}"]).cluster
    assert cluster.name == name
    text = (CONF_DIR / "cluster" / f"{name}.yaml").read_text(encoding="utf-8")
    assert f"\n  description: {cluster.description}\n" in text


def test_every_yaml_is_of_a_command() -> None:
    assert all(find_command(job).name == job for job in JOBS)
    assert {path.stem for path in CONF_DIR.glob("*.yaml")} == set(JOBS)


@pytest.mark.parametrize("cluster", cluster_names())
@pytest.mark.parametrize(
    "job",
    [job for job in JOBS if job not in ("curate", "preflight", "tokenize", "teach")],
)
def test_every_job_composes_on_every_cluster(job: str, cluster: str) -> None:
    whole = job in ("prune", "plan")
    needed = {"drop": ["drop.num_layers=1"], "pretrain": []}.get(job, [FROM])
    config = load_config(job, [f"+cluster={cluster}", *([] if whole else needed)])
    assert isinstance(config, Config)
    assert config.cluster.name == cluster
    assert config.stages == (list(USUAL) if whole else [job])


@pytest.mark.parametrize("cluster", cluster_names())
def test_tokenize_composes_on_every_cluster(cluster: str) -> None:
    config = load_config("tokenize", [f"+cluster={cluster}", "tokenize.shard_bytes=5"])
    assert isinstance(config, TokenizeJobConfig)
    assert config.cluster.name == cluster
    assert config.tokenize == TokenizeConfig(shard_bytes=5)
    whole = load_config("prune", [f"+cluster={cluster}"])
    assert isinstance(whole, Config)
    assert config.data == whole.data


@pytest.mark.parametrize("cluster", cluster_names())
def test_curate_composes_on_every_cluster(cluster: str) -> None:
    config = load_config("curate", [f"+cluster={cluster}", "curate.shard_bytes=5"])
    assert isinstance(config, CurateJobConfig)
    assert config.cluster.name == cluster
    assert config.curate == CurateConfig(shard_bytes=5)


@pytest.mark.parametrize("name", presets()["curate"])
def test_presets_of_curate_are_its_alone(name: str) -> None:
    text = (CONF_DIR / "curate" / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith("# @package _global_\n# ")
    config = load_config("curate", [f"curate={name}", "curate.seed=3"])
    assert config.curate.sources
    assert config.curate.seed == 3
    with pytest.raises(InputError, match="curate"):
        load_config("prune", [f"curate={name}"])


@pytest.mark.parametrize("cluster", cluster_names())
def test_teach_composes_on_every_cluster(cluster: str) -> None:
    config = load_config("teach", [f"+cluster={cluster}", "data.train=tokens", "teach.seed=5"])
    assert isinstance(config, TeachJobConfig)
    assert config.cluster.name == cluster
    assert config.teach == TeachConfig(seed=5)
    whole = load_config("prune", [f"+cluster={cluster}"])
    assert isinstance(whole, Config)
    assert config.model == whole.model, "GPUs hold the teacher in bfloat16"


def test_composed_config_holds_only_plain_values() -> None:
    def check(value: Any) -> None:
        if is_dataclass(value):
            for field in fields(value):
                check(getattr(value, field.name))
        else:
            assert type(value) in (int, float, bool, str, list, type(None)), value

    check(load_config("prune", []))
    check(load_config("pretrain", []))


def test_no_cluster_means_local() -> None:
    assert load_config("prune", []) == load_config("prune", ["+cluster=local"]) == Config()
    assert load_config("pretrain", []).pretrain == PretrainConfig()
    assert load_config("tokenize", []) == TokenizeJobConfig()
    assert load_config("preflight", []) == PreflightJobConfig()


def test_cluster_preset_sets_other_groups_and_the_command_line_wins() -> None:
    preset = load_config("prune", ["+cluster=h100x32"])
    assert isinstance(preset, Config)
    assert (preset.distill.precision, preset.model.dtype) == ("bf16", "bfloat16")
    assert (preset.data.sequence_length, preset.prune.num_samples) == (2048, 512)
    assert preset.distill.num_tokens == 13_000_000_000
    for words in (
        ["distill.precision=fp32", "cluster.num_workers=16", "+cluster=h100x32"],
        ["+cluster=h100x32", "distill.precision=fp32", "cluster.num_workers=16"],
    ):
        config = load_config("prune", words)
        assert isinstance(config, Config)
        assert config == replace(
            preset,
            distill=replace(preset.distill, precision="fp32"),
            cluster=replace(preset.cluster, num_workers=16),
        )


def test_loading_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hydra.core.global_hydra import GlobalHydra

    monkeypatch.chdir(tmp_path)
    load_config("prune", [])
    assert Path.cwd() == tmp_path
    assert list(tmp_path.iterdir()) == []
    assert not GlobalHydra.instance().is_initialized()


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        ("[0.7 stdlib, 0.3 books.txt]", ["0.7 stdlib", "0.3 books.txt"]),
        ("[7 stdlib,3 /data/b-c_d.jsonl.gz]", ["7 stdlib", "3 /data/b-c_d.jsonl.gz"]),
        ("[1 hf:allenai/c4:en@train]", ["1 hf:allenai/c4:en@train"]),
        ('["0.5 my (old) books.txt",.5 code]', ["0.5 my (old) books.txt", ".5 code"]),
        ("[]", []),
    ],
)
def test_mix_on_the_command_line(text: str, entries: list[str]) -> None:
    config = load_config("prune", [f"data.mix={text}"])
    assert isinstance(config, Config)
    assert config.data.mix == entries


def test_mix_weights_are_shares_of_their_sum() -> None:
    from conf.options.data import parse_mix

    assert parse_mix("data.mix", ["3 a b.txt", " 1  hf:x@y "]) == [
        (0.75, "a b.txt"), (0.25, "hf:x@y"),
    ]  # fmt: skip


# --- rules


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        # stages
        (lambda: Config(stages=[]), ["stages=[]", "at least one"]),
        (lambda: Config(stages=["prune", "distil"]), ["'distil'", "did you mean distill?"]),
        (lambda: Config(stages=["prune", "prune"]), ["twice", "[prune]"]),
        (
            lambda: Config(stages=["evaluate", "prune"]),
            ["stages=[evaluate,prune]", "out of order", "stages=[prune,evaluate]"],
        ),
        (lambda: Config(stages=["distill"]), ["run.from", "required", "run.from=runs/"]),
        # run
        (lambda: RunConfig(seed=-1), ["run.seed=-1", "at least 0", "2**63 - 1"]),
        (lambda: RunConfig(dir=" "), ["run.dir", "empty"]),
        (lambda: RunConfig(from_=""), ["run.from:", "empty"]),
        (lambda: RunConfig(redo=["prun"]), ["run.redo=prun", "did you mean prune?", "all"]),
        (lambda: RunConfig(redo=["all", "prune"]), ["run.redo=[all,prune]", "run.redo=[all]"]),
        (lambda: RunConfig(redo=["prune", "prune"]), ["run.redo", "twice"]),
        (
            lambda: Config(stages=["prune"], run=RunConfig(redo=["export"])),
            ["run.redo=[export]", "not a stage of this run", "prune, or all"],
        ),
        # model, data, export
        (lambda: ModelConfig(path=""), ["model.path", "empty"]),
        (lambda: ModelConfig(dtype="fp16"), ["model.dtype=fp16", "float32, bfloat16, float16"]),
        (lambda: Config(model=ModelConfig(dtype="float16")), ["model.dtype=float16", "GPU"]),
        (lambda: DataConfig(heldout_share=0), ["data.heldout_share=0", "more than 0"]),
        (lambda: DataConfig(heldout_share=0.51), ["data.heldout_share=0.51", "at most 0.5"]),
        (lambda: DataConfig(sequence_length=7), ["data.sequence_length=7", "at least 8"]),
        (lambda: DataConfig(separator=""), ["data.separator", "empty"]),
        (lambda: DataConfig(mix=["stdlib"]), ["data.mix=[stdlib]", "'stdlib'", "weight over 0"]),
        (lambda: DataConfig(mix=["0.5 "]), ["entry '0.5 '", "[0.7 stdlib,0.3 books.txt]"]),
        (lambda: DataConfig(mix=["1 code", "0 a.txt"]), ["entry '0 a.txt'", "weight over 0"]),
        (lambda: DataConfig(mix=["nan a.txt"]), ["entry 'nan a.txt'", "weight over 0"]),
        (lambda: DataConfig(mix=["x a.txt"]), ["entry 'x a.txt'", "weight over 0"]),
        (lambda: DataConfig(mix=["1 a", "2  a"]), ["entry '2  a'", "a second time"]),
        (lambda: DataConfig(text_field=" "), ["data.text_field", "empty"]),
        (lambda: ExportConfig(dtype="int8"), ["export.dtype=int8", "bfloat16"]),
        # prune
        (lambda: PruneConfig(method="sparsgpt"), ["prune.method", "did you mean sparsegpt?"]),
        (lambda: PruneConfig(method="resolve"), ["prune.method", "now called sparsegpt_refit"]),
        (lambda: PruneConfig(baselines=["x"]), ["prune.baselines=x", "wanda"]),
        (lambda: PruneConfig(baselines=["wanda", "wanda"]), ["twice", "[wanda]"]),
        (lambda: PruneConfig(pattern="2-4"), ["prune.pattern=2-4", "N:M", "unstructured:0.5"]),
        (lambda: PruneConfig(pattern="4:4"), ["prune.pattern=4:4", "1 <= N < M"]),
        (lambda: PruneConfig(pattern="2:512"), ["prune.pattern=2:512", "at most 256"]),
        (lambda: PruneConfig(pattern="0:4"), ["prune.pattern=0:4", "1 <= N < M"]),
        (lambda: PruneConfig(pattern="2:4 "), ["prune.pattern=2:4 ", "not a pattern"]),
        (lambda: PruneConfig(pattern="unstructured:1"), ["between 0 and 1"]),
        (lambda: PruneConfig(pattern="unstructured:nan"), ["not a pattern"]),
        (lambda: PruneConfig(block_size=130), ["prune.block_size=130", "4", "128 or 132"]),
        (lambda: PruneConfig(block_size=2), ["prune.block_size=2", "use prune.block_size=4"]),
        (lambda: PruneConfig(num_samples=0), ["prune.num_samples=0", "at least 1"]),
        (lambda: PruneConfig(batch_size=-1), ["prune.batch_size=-1", "at least 1"]),
        (lambda: PruneConfig(damping=0), ["prune.damping=0", "more than 0"]),
        (lambda: PruneConfig(damping=1.5), ["prune.damping=1.5", "at most 1"]),
        (
            lambda: PruneConfig(rotation_steps=5, existing="keep"),
            ["prune.rotation_steps=5", "prune.existing=keep", "prune.existing=ignore"],
        ),
        (
            lambda: PruneConfig(overlap=True, activations="disk"),
            ["prune.overlap=true", "prune.activations=disk", "prune.activations=device"],
        ),
        # distill
        (lambda: DistillConfig(beta1=1.0), ["distill.beta1=1.0", "less than 1"]),
        (lambda: DistillConfig(beta2=-0.1), ["distill.beta2=-0.1", "at least 0"]),
        (lambda: DistillConfig(temperature=0), ["distill.temperature=0", "more than 0"]),
        (lambda: DistillConfig(learning_rate=-1.0), ["distill.learning_rate=-1.0"]),
        (lambda: DistillConfig(max_grad_norm=0), ["distill.max_grad_norm=0"]),
        (lambda: DistillConfig(min_learning_rate_share=2), ["min_learning_rate_share=2"]),
        (
            lambda: DistillConfig(schedule=["kl_weight:0@0.5"]),
            ["kl_weight", "all 0 at some moment"],
        ),
        (lambda: DistillConfig(schedule=["rate:0@1"]), ["distill.schedule", "'rate'"]),
        (lambda: DistillConfig(kl_weight=0), ["every loss weight is 0", "distill.ce_weight"]),
        (
            lambda: DistillConfig(moving_start="dense"),
            ["distill.moving_start=dense", "distill.moving_share=0", "moving_start=given"],
        ),
        (
            lambda: DistillConfig(on_time_limit="finish"),
            ["distill.on_time_limit=finish", "there is no limit", "distill.time_limit_hours"],
        ),
        (
            lambda: DistillConfig(on_time_limit="finish", time_limit_hours=1, moving_share=0.5),
            ["distill.moving_share=0.5", "masks that still move", "distill.on_time_limit=stop"],
        ),
        (
            lambda: CurateConfig(as_messages=True, fields=["text"]),
            ["curate.as_messages=true", "curate.fields=[text]", "leave one of the two out"],
        ),
        (
            lambda: DistillConfig(moving_start="denes", moving_share=0.1),
            ["distill.moving_start=denes", "did you mean dense?"],
        ),
        (lambda: DistillConfig(ce_weight=-1), ["distill.ce_weight=-1", "at least 0"]),
        (lambda: DistillConfig(precision="fp16"), ["distill.precision=fp16", "fp32, bf16"]),
        (
            lambda: DistillConfig(attention="flash"),
            ["distill.attention=flash", "auto, varlen, masked"],
        ),
        (lambda: DistillConfig(zero_stage=4), ["distill.zero_stage=4", "at most 3"]),
        (lambda: DistillConfig(checkpoint_every_steps=0), ["distill.checkpoint_every_steps=0"]),
        (
            lambda: Config(distill=DistillConfig(batch_size=20)),
            ["distill.batch_size=20", "multiple of 16", "=16 or 32", "cluster.num_workers=2"],
        ),
        (
            lambda: Config(distill=DistillConfig(batch_size=8)),
            ["distill.batch_size=8", "=16,", "smaller distill.micro_batch_size"],
        ),
        (
            lambda: Config(distill=DistillConfig(num_tokens=4095)),
            ["distill.num_tokens=4095", "one step of 4096", "at least 4096"],
        ),
        (  # the option that was set is the one that is named first
            lambda: Config(data=DataConfig(sequence_length=10**6)),
            ["data.sequence_length=1000000: distill.num_tokens is less than one step of 16000000"],
        ),
        (
            lambda: Config(data=DataConfig(sequence_length=10**6), stages=["prune", "evaluate"]),
            ["data.sequence_length=1000000: evaluate.num_tokens is less than one row"],
        ),
        # evaluate, quantize, tracker
        (lambda: EvaluateConfig(num_tokens=0), ["evaluate.num_tokens=0"]),
        (lambda: EvaluateConfig(batch_size=0), ["evaluate.batch_size=0"]),
        (
            lambda: Config(evaluate=EvaluateConfig(num_tokens=255)),
            [
                "evaluate.num_tokens=255",
                "data.sequence_length=256",
                "at least 256",
            ],
        ),
        (lambda: QuantizeConfig(method="awq"), ["quantize.method=awq", "gptq, rtn"]),
        (lambda: QuantizeConfig(scheme="int3"), ["quantize.scheme=int3", "int4, int8"]),
        (lambda: QuantizeConfig(group_size=0), ["quantize.group_size=0", "-1"]),
        (lambda: QuantizeConfig(damping=0), ["quantize.damping=0"]),
        (lambda: TrackerConfig(wandb="on"), ["tracker.wandb=on", "auto, online, offline, off"]),
        (lambda: TrackerConfig(project="a/b"), ["tracker.project=a/b", "refuses /"]),
        # teach, and what its cache cannot say
        (lambda: TeachConfig(out=" "), ["teach.out", "empty"]),
        (lambda: TeachConfig(num_samples=0), ["teach.num_samples=0", "at least 1"]),
        (lambda: TeachConfig(batch_size=0), ["teach.batch_size=0", "at least 1"]),
        (lambda: TeachConfig(temperature=0.0), ["teach.temperature=0.0", "more than 0"]),
        (lambda: TeachConfig(flatness=0.5), ["teach.flatness=0.5", "at least 1"]),
        (lambda: TeachConfig(seed=-1), ["teach.seed=-1", "at least 0"]),
        (lambda: TeachJobConfig(), ["data.train: is required", "jobs.tokenize"]),
        (lambda: cached(teacher_cache=" "), ["distill.teacher_cache", "is empty"]),
        (lambda: cached(reverse_kl_weight=1.0), ["teacher_cache=c", "reverse_kl_weight=0"]),
        (lambda: cached(square_head_weight=1.0), ["no hidden states", "square_head_weight=0"]),
        (
            lambda: cached(schedule=["square_head_weight:1@0.5"]),
            ["square_head_weight=0", "distill.schedule"],
        ),
        (lambda: cached(kl_weight=0.0, ce_weight=1.0), ["only the KL term reads it"]),
        (
            lambda: cached(schedule=["temperature:2@0.5"]),
            ["one temperature", "from 1 to 2", "leave it out of the schedule"],
        ),
        (lambda: cached(teacher_dtype="float8"), ["teacher_dtype=float8", "no teacher is loaded"]),
        # tokenize
        (lambda: TokenizeConfig(out=" "), ["tokenize.out", "empty"]),
        (lambda: TokenizeConfig(shard_bytes=0), ["tokenize.shard_bytes=0", "at least 1"]),
        # pretrain
        (lambda: PretrainConfig(vocab_size=256), ["vocab_size=256", "at least 257"]),
        (
            lambda: Config(stages=["pretrain"], pretrain=PretrainConfig(num_tokens=8191)),
            ["pretrain.num_tokens=8191", "8192"],
        ),
        (lambda: Config(stages=["pretrain", "prune"]), ["stages=[pretrain,prune]", "model.path="]),
        (lambda: Config(stages=["pretrain"], run=RunConfig(from_="x")), ["run.from=x", "random"]),
        (lambda: PretrainConfig(kl_weight=1.0), ["pretrain.kl_weight=1.0", "no teacher"]),
        (lambda: PretrainConfig(schedule=["kl_weight:1@0.5"]), ["pretrain.schedule=[", "teacher"]),
        (lambda: PretrainConfig(config="c", num_layers=3), ["pretrain.num_layers=3", "config=c"]),
        (lambda: PretrainConfig(precision="bf16", zero_stage=0), ["pretrain.zero_stage=0"]),
        (lambda: PretrainConfig(hidden_size=100), ["pretrain.hidden_size=100", "96 or 104"]),
        (lambda: PretrainConfig(num_kv_heads=3), ["pretrain.num_kv_heads=3", "1, 2, 4"]),
        (lambda: PretrainConfig(learning_rate=0), ["pretrain.learning_rate=0"]),
    ],
)
def test_broken_rule_names_field_value_rule_and_fix(make: Any, parts: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        make()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


FLOAT_FIELDS = [
    (owner, field.name)
    for owner in (DataConfig, PruneConfig, DistillConfig, QuantizeConfig, PretrainConfig)
    for field in fields(owner)
    if field.type == "float"
]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("owner", "name"), FLOAT_FIELDS)
def test_every_float_is_finite(owner: Any, name: str, bad: float) -> None:
    with pytest.raises(InputError, match=f"{name}=.*finite number"):
        owner(**{name: bad})


@pytest.mark.parametrize(
    "pattern", ["2:4", "4:8", "1:2", "1:16", "unstructured:0.5", "unstructured:.7"]
)
def test_patterns_that_pass(pattern: str) -> None:
    assert PruneConfig(pattern=pattern).pattern == pattern


def test_patterns_that_pass_here_pass_in_sparsify_too() -> None:
    from sparsify.pattern import Pattern

    for pattern in ("2:4", "4:8", "1:2", "unstructured:0.5"):
        assert str(Pattern.parse(PruneConfig(pattern=pattern).pattern)) == pattern


def test_edges_that_pass() -> None:
    DataConfig(heldout_share=0.5, sequence_length=8)
    DistillConfig(kl_weight=0, reverse_kl_weight=1, schedule=["temperature:1@1"], temperature=2)
    DistillConfig(zero_stage=0, kl_weight=0, ce_weight=0.1, beta1=0, min_learning_rate_share=1)
    Config(distill=DistillConfig(num_tokens=4096))
    Config(stages=["report"], run=RunConfig(from_="runs/a"))
    Config(stages=["prune"], distill=DistillConfig(batch_size=20))  # rule of a stage not run
    Config(model=ModelConfig(dtype="float16"), cluster=StagedClusterSpec(gpus_per_worker=1))


def test_methods_known_to_the_rules_are_those_of_sparsify() -> None:
    from conf.checks import METHODS
    from sparsify.methods import available_methods

    assert set(METHODS) == set(available_methods())


@pytest.mark.parametrize(
    ("stages", "path", "from_", "expected"),
    [
        (list(USUAL), "embedded", None, "runs/embedded-2-4-twofour"),
        (list(USUAL), "/models/llama/", None, "runs/llama-2-4-twofour"),
        (["drop"], "/models/llama", None, "runs/llama-drop-angular"),
        (["drop", "prune"], "/models/llama", None, "runs/llama-drop-angular-2-4-twofour"),
        (["drop"], "embedded", "runs/a", "runs/a-drop"),
        (["finetune"], "embedded", None, "runs/embedded-finetune"),
        (["pretrain"], "embedded", None, "runs/pretrain"),
        (["quantize"], "embedded", "runs/a", "runs/a-quantize"),
        (["quantize"], "embedded", "./runs/a/distill/", "runs/a-quantize"),
        (["quantize", "export"], "embedded", "distill", "runs/distill-quantize-export"),
        (["export"], "embedded", "..", "runs/model-export"),
    ],
)
def test_default_run_dir(stages: list[str], path: str, from_: str | None, expected: str) -> None:
    config = Config(
        stages=stages, model=ModelConfig(path=path), run=RunConfig(from_=from_),
        drop=DropConfig(num_layers=1),
    )  # fmt: skip
    assert default_run_dir(config) == expected


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "drop.num_layers: nothing says what to drop; give one of"),
        ({"num_layers": 1, "share": 0.5}, "drop.num_layers=1 and drop.share=0.5: more than one"),
        ({"num_layers": 1, "layers": [2]}, "drop.num_layers=1 and drop.layers=[2]: more than"),
        ({"layers": [1, 1]}, "drop.layers=[1,1]: must be numbers from 0 on, each once"),
        ({"layers": [-1]}, "drop.layers=[-1]: must be numbers from 0 on"),
        ({"num_layers": 1, "candidates": ["mlp"]},
         "drop.candidates=[mlp]: has no effect with drop.rule=angular"),
        ({"num_layers": 1, "candidates": []}, "drop.candidates=[]: nothing to choose from"),
        ({"num_layers": 1, "rule": "deepest", "num_rows": 8},
         "drop.num_rows=8: has no effect with drop.rule=deepest"),
        ({"layers": [1], "rule": "greedy", "num_rows": 8},
         "drop.rule=greedy and drop.num_rows=8: has no effect with drop.layers=[1]"),
        ({"num_layers": 4}, "drop.num_layers=4: the model has 4 layers and one of them must stay"),
        ({"layers": [0, 1, 2, 3]}, "drop.layers=[0,1,2,3]: the model has 4 layers and"),
        ({"layers": [0, 4, 5]}, "drop.layers=[0,4,5]: the model has layers 0 to 3; leave"),
        ({"share": 0.9}, "drop.share=0.9: the model has 4 layers and one of them must stay"),
        ({"num_layers": 8, "rule": "greedy", "candidates": ["attention", "mlp"]},
         "drop.num_layers=8: the model has 8 sublayers and one of them must stay"),
    ],
)  # fmt: skip
def test_what_to_drop_is_said_once_and_can_be_done(given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as error:
        Config(stages=["drop"], drop=DropConfig(**given)).drop.num_dropped(4)
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)


def test_a_share_of_the_layers() -> None:
    assert [DropConfig(share=share).num_dropped(8) for share in (0.01, 0.25, 0.8)] == [1, 2, 6]
    sublayers = DropConfig(share=0.25, rule="greedy", candidates=["attention", "mlp"])
    assert sublayers.num_dropped(8) == 4
    assert [DropConfig().rows, DropConfig(rule="deepest").rows, DropConfig(layers=[1]).rows] == (
        [128, 0, 0]
    )


def test_rules_known_to_the_options_are_those_of_sparsify() -> None:
    from conf.checks import RULES
    from sparsify.dropping import PARTS, available_rules

    assert set(RULES) == set(available_rules())
    assert drop.PARTS == PARTS


def test_to_dict_uses_the_names_people_write() -> None:
    run = to_dict(Config(run=RunConfig(from_="x")))["run"]
    assert run == {"dir": None, "from": "x", "seed": 0, "redo": [], "until": None, "recipe": None}


ABSURD: dict[str, list[Any]] = {
    "int": [-1, 0, 7, 10**6, 10**12],
    "float": [-1.0, 0.0, 1e9, math.nan, math.inf],
    "str": ["", " ", "x y", "2:5"],
    "list[str]": [["zzz"], ["a", "a"]],
}


@pytest.mark.parametrize("stages", [list(USUAL), ["distill"]])
def test_a_wrong_value_is_answered_with_its_own_name(stages: list[str]) -> None:
    """Also where it is a rule of several options that it breaks."""
    base = to_dict(Config()) | {"stages": stages}
    base["run"]["from"] = "runs/earlier"
    num_refused = 0
    for key, option in job_options("prune").items():
        for value in ABSURD.get(option.type_name, []):
            plain = json.loads(json.dumps(base))
            *groups, leaf = key.split(".")
            node = plain
            for group in groups:
                node = node[group]
            node[leaf] = value
            said = refusal(plain)
            assert said is None or key in said.partition(": ")[0], said
            num_refused += said is not None
    assert num_refused > 150


def refusal(plain: dict[str, Any]) -> str | None:
    try:
        made_of(Config, plain)
    except ValueError as error:
        return str(error)
    return None


def made_of(kind: type, plain: dict[str, Any]) -> Any:
    """A dataclass of nested plain values under the names that people write."""
    hints = get_type_hints(kind)
    values = {ALIASES.get(name, name): value for name, value in plain.items()}
    return kind(
        **{n: made_of(hints[n], v) if is_dataclass(hints[n]) else v for n, v in values.items()}
    )


def test_numbers_of_layers_are_written_as_numbers() -> None:
    config = load_config("drop", ["drop.layers=[21,3]"])
    assert isinstance(config, Config)
    assert config.drop.layers == [21, 3]
