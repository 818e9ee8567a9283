"""Adapters on a frozen model: 4 bits, the folder that others load, and folders of other models."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conf.options.data import DataConfig
from conf.options.finetune import FinetuneConfig
from conf.options.run import RunConfig
from conf.schema import Config
from jobs.benchmarks.support.families import family_config
from jobs.cli.compose import load_config
from jobs.pipeline import describe_plan
from jobs.planning.models import shape_of
from jobs.training import adapters as _adapters
from jobs.workers import finetune
from jobs.workers.finetune_inputs import memory_lines
from sparsify.adapters.lora import adapters_of
from sparsify.costs.deploy import AdapterTraining, adapter_memory
from sparsify.data.rows import TokenRows
from sparsify.data.store import TokenStore
from sparsify.data.store_write import write_rows
from sparsify.errors import InputError
from sparsify.models.load import load_model, load_tokenizer
from tests.conftest import message
from tests.integration.recoveries import Worker, make_base

RANK = 4


def config_of(**settings: Any) -> Config:
    given = {"adapter": "lora", "rank": RANK, "alpha": 8.0, **settings}
    config = Config(
        stages=["finetune"], run=RunConfig(from_="x"), data=DataConfig(sequence_length=32),
        finetune=FinetuneConfig(**given),
    )  # fmt: skip
    config.distill = config.finetune.training(10**6)
    return config


def adapted(folder: Path, **settings: Any) -> Any:
    config = config_of(**settings)
    worker: Any = Worker(0, 1, name="finetune")
    student = _adapters.load_adapted(folder, True, config, worker, None)
    generator = torch.Generator().manual_seed(1)
    for adapter in adapters_of(student.model).values():
        drawn = torch.randn(adapter.up_OR.shape, generator=generator)
        adapter.up_OR.data.copy_(0.05 * drawn)
    return student.model.eval()


def test_peft_loads_the_folder_and_computes_the_same(
    tiny_model_dir: Path, tiny_rows, tmp_path: Path
) -> None:
    import peft

    model = adapted(tiny_model_dir, merge="at_merge")
    expected = model(tiny_rows.ids_NT).logits
    _adapters.write_adapters(tmp_path / "a", tiny_model_dir, adapters_of(model), RANK)
    loaded = peft.PeftModel.from_pretrained(load_model(tiny_model_dir), str(tmp_path / "a")).eval()
    torch.testing.assert_close(loaded(tiny_rows.ids_NT).logits, expected, rtol=1e-5, atol=1e-5)
    plain = load_model(tiny_model_dir)(tiny_rows.ids_NT).logits
    assert (plain - expected).abs().max() > 0.1
    # Read again they are the same, and may be started from.
    sha256 = json.loads((tmp_path / "a/sparse.json").read_text())["base_sha256"]
    read = _adapters.read_adapters(tmp_path / "a", sha256)
    for name, adapter in adapters_of(model).items():
        assert torch.equal(read[name][0], adapter.down_RI)
        assert torch.equal(read[name][1], adapter.up_OR)


def test_adapters_of_another_model_are_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    model, folder = adapted(tiny_model_dir), tmp_path / "a"
    _adapters.write_adapters(folder, tiny_model_dir, adapters_of(model), RANK)
    with pytest.raises(InputError) as error:
        _adapters.read_adapters(folder, "0" * 64)
    assert "was trained on another model" in message(error)
    (folder / "sparse.json").unlink()  # as of somebody else
    worker: Any = Worker(0, 1, name="finetune")

    def start(**settings: Any) -> None:
        _adapters.load_adapted(tiny_model_dir, True, config_of(**settings), worker, folder)

    start()
    with pytest.raises(InputError) as error:
        start(rank=8)
    assert "an adapter of shape (4, 64), and here it is (8, 64)" in message(error)
    with pytest.raises(InputError) as error:
        start(targets=["*.mlp.*"])
    assert "has an adapter of model.layers.0.self_attn" in message(error)
    weights = load_file(folder / "adapter_model.safetensors")
    renamed = {name.replace("layers.0", "layers.7"): one for name, one in weights.items()}
    save_file(renamed, folder / "adapter_model.safetensors")
    with pytest.raises(InputError) as error:
        start()
    assert "has an adapter of model.layers.7" in message(error)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(InputError) as error:
        start()
    assert "has no adapter_model.safetensors" in message(error)


def test_globs_that_name_no_layer_are_refused(tiny_model_dir: Path) -> None:
    with pytest.raises(InputError) as error:
        adapted(tiny_model_dir, targets=["*.nothing"])
    assert "names no linear layer of the blocks" in message(error)


def test_zeros_are_zeros_in_4_bits(tiny_model_dir: Path, tmp_path: Path) -> None:
    make_base(tmp_path, tiny_model_dir)
    config = config_of(adapter="qlora")
    worker: Any = Worker(0, 1, name="finetune")
    student = _adapters.load_adapted(tmp_path / "student", False, config, worker, None)
    found = adapters_of(student.model)
    assert set(found) == set(student.masks)
    for name, adapter in found.items():
        weight, keep_mask = adapter._weight(), student.masks[name]
        assert bool((weight[~keep_mask] == 0).all())
        assert int((weight != 0).sum()) > 0.4 * weight.numel()
        assert torch.equal(adapter.trained_weight(), weight), "no change at first"


def test_memory_by_the_config_is_that_of_the_tensors(tiny_model_dir: Path, monkeypatch) -> None:
    held: list[tuple[int, int]] = []
    quantize = _adapters.bitsandbytes.functional.quantize_4bit

    def measured(weight: torch.Tensor, **settings: Any) -> Any:
        packed, state = quantize(weight, **settings)
        scales = [state.absmax, state.state2.absmax]
        held.append((weight.numel(), sum(one.nbytes for one in (packed, *scales))))
        return packed, state

    monkeypatch.setattr(_adapters.bitsandbytes.functional, "quantize_4bit", measured)
    model = adapted(tiny_model_dir, adapter="qlora", precision="bf16", micro_batch_size=2)
    shape, _ = shape_of(str(tiny_model_dir))
    own = adapters_of(model).values()
    features = sum(one.down_RI.shape[1] + one.up_OR.shape[0] for one in own)
    setup = AdapterTraining(RANK, 64, num_features=features, adapter_bytes=16.0)
    parts = adapter_memory(shape, setup)
    for numel, size in held:
        assert size == numel // 2 + numel // 64 + 4 * math.ceil(numel / 64 / 256)
    rest = sum(p.nbytes for name, p in model.named_parameters() if "adapter" not in name)
    assert parts["weights"] == pytest.approx(sum(size for _, size in held) + rest, rel=2e-3)
    trained = sum(p.numel() for one in own for p in one.parameters())
    assert parts["adapters"] == 16 * trained  # weight, gradient, two moments, all float32
    config = config_of(adapter="qlora", micro_batch_size=2, recompute_share=1.0)
    (line,) = memory_lines(config, tiny_model_dir)
    assert line.startswith("memory: ") and "adapters" in line and "less with" not in line
    config.finetune.recompute, config.finetune.merge = "elementwise", "at_merge"
    (more,) = memory_lines(config, tiny_model_dir)
    assert more.endswith("; less with finetune.recompute=whole")
    config.finetune.recompute_share = 0.0
    (most,) = memory_lines(config, tiny_model_dir)
    assert most.endswith("; less with finetune.recompute_share=1 finetune.recompute=whole")
    gigabytes = [float(said.split()[1]) for said in (line, more, most)]
    assert gigabytes == sorted(gigabytes)
    assert memory_lines(config_of(), tiny_model_dir) == []


def test_memory_is_that_of_the_stage_s_own_workers(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch
) -> None:
    """As a dry run shows it: masters and moments of an adapter are split, a copy is added."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    Path("text.txt").write_text("once upon a time " * 50, encoding="utf-8")
    words = [
        f"model.path={tiny_model_dir}", "finetune.data=text.txt", "finetune.num_tokens=64",
        "finetune.batch_size=16", "finetune.adapter=qlora", "finetune.zero_stage=1",
        "data.sequence_length=32", "cluster.num_workers=1",
    ]  # fmt: skip

    def adapters_gb(*more: str) -> float:
        told = describe_plan(load_config("finetune", [*words, *more]))
        (line,) = (line for line in told if line.strip().startswith("memory: "))
        return float(line.partition("adapters ")[2].partition(",")[0])

    alone, both = adapters_gb(), adapters_gb("cluster.stages.finetune.num_workers=2")
    assert both / alone == pytest.approx((12 + 16 / 2) / 16, rel=0.02)  # shown to three digits


def test_memory_of_what_cannot_be_followed_is_not_known(tmp_path: Path) -> None:
    family_config("jetmoe").save_pretrained(tmp_path)
    (line,) = memory_lines(config_of(adapter="qlora"), tmp_path)
    assert line.startswith("memory: not known (JetMoeForCausalLM")


def test_tokens_that_a_frozen_head_cannot_tell_apart_are_said(tiny_model_dir, tmp_path) -> None:
    """As the end token of a model that never saw one: its row is that of other unused tokens."""
    config, tokenizer = config_of(), load_tokenizer(tiny_model_dir)
    worker: Any = Worker(0, 1, name="finetune")
    student = _adapters.load_adapted(tiny_model_dir, True, config, worker, None)
    end = tokenizer.eos_token_id
    ids_NT = torch.tensor([[5, 6, 7, end], [8, 7, 6, end]])
    is_answer_NT = torch.tensor([[False, False, True, True]] * 2)
    rows = TokenRows(ids_NT, torch.arange(4).repeat(2, 1), is_answer_NT=is_answer_NT)
    write_rows(tmp_path / "rows", {"train": rows}, tokenizer, 4)
    store = TokenStore.open(tmp_path / "rows")

    def said() -> list[str]:
        worker.said.clear()
        finetune._warn_of_alike_tokens(worker, config, student, tokenizer, store)
        return worker.said

    assert said() == []
    weight_VD = student.head.linear.weight.data
    weight_VD[8] = weight_VD[5]  # are asked, not learned
    assert said() == []
    weight_VD[9] = weight_VD[end]
    (line,) = said()
    assert "1 of 3 tokens to learn ('<|endoftext|>') have another token's row in the" in line


def test_adapters_keep_the_zero_stage() -> None:
    for stage in (0, 1, 2):
        settings = FinetuneConfig(adapter="qlora", precision="bf16", zero_stage=stage)
        assert settings.training(10**6).zero_stage == stage


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rank": 8}, "finetune.rank=8: is for adapters, and finetune.adapter=none"),
        ({"merge": "at_merge"}, "finetune.merge=at_merge: is for adapters"),
        ({"adapter": "lora", "zero_stage": 3}, "finetune.zero_stage=3 with finetune.adapter=lora"),
        (
            {"adapter": "lora", "recompute": "elementwise", "recompute_share": 1.0},
            "finetune.recompute=elementwise with finetune.adapter=lora and finetune.merge=masked",
        ),
        ({"adapter": "lora", "targets": []}, "finetune.targets=[]"),
        ({"square_head_weight": 1.0}, "finetune.square_head_weight: compares with a teacher"),
        ({"teacher": "x"}, "nothing is learned from it while"),
        ({"ce_weight": 0.0}, "finetune.kl_weight=0 and finetune.reverse_kl_weight=0"),
    ],
)
def test_options_that_make_no_sense_together(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as error:
        Config(
            stages=["finetune"], run=RunConfig(from_="x"), finetune=FinetuneConfig(**settings)
        )  # fmt: skip
    assert said in message(error)
    assert "distill" not in message(error)
