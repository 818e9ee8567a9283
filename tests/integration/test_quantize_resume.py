"""Quantising a checkpoint block by block: as in memory, killed at any moment, on two processes."""

from __future__ import annotations

import hashlib
import random
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from sparsify.calibration.hidden_states import Memory
from sparsify.comm import Comm
from sparsify.data.rows import TokenRows
from sparsify.errors import InputError
from sparsify.formats.kinds.packed import Fragments, publish_fragments
from sparsify.formats.source import Source, open_source
from sparsify.formats.verify import check_packed
from sparsify.masks.select import keep_mask_from_scores
from sparsify.models.blocks import BlocksOnDisk
from sparsify.models.load import load_model
from sparsify.models.save import save_model
from sparsify.models.structure import find_blocks, linears_of
from sparsify.packed.folder import PackedFolder
from sparsify.params import QuantParams
from sparsify.pattern import Pattern
from sparsify.quantization import quantize_model
from sparsify.quantization.quantize import quantize_checkpoint
from sparsify.quantization.schemes import get_scheme
from tests.integration.recoveries import exit_codes, warm_context

NUM_KILLS = 6
NUM_BLOCKS = 6
PATTERN = Pattern.parse("2:4")
PARAMS = QuantParams(group_size=32, num_refine_sweeps=2, num_scale_steps=4)
FP8 = replace(PARAMS, scheme="fp8", group_size=None)


def masks_of(folder: Path) -> dict[str, Tensor]:
    list_name, blocks = find_blocks(load_model(folder))
    return {
        f"{list_name}.{index}.{name}": layer.weight != 0
        for index, block in enumerate(blocks)
        for name, layer in linears_of(block).items()
    }


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sparse") / "model"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=NUM_BLOCKS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for block in model.model.layers:
        for layer in linears_of(block).values():
            keep = keep_mask_from_scores(layer.weight.detach().abs(), PATTERN)
            layer.weight.data.masked_fill_(~keep, 0.0)
    save_model(model, None, folder)
    return folder


def calibration() -> TokenRows:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 64, (12, 32), generator=generator)
    positions = torch.cat([torch.arange(13), torch.arange(19)])  # two documents a row
    return TokenRows(ids, positions.expand(12, 32).contiguous())


def quantize_to(
    sparse: Path, out: Path, comm: Comm | None = None, params: QuantParams = PARAMS, **options
):
    torch.set_num_threads(1)
    memory = Memory(options.pop("batch_size", 4), activations=options.pop("activations", "device"))
    return quantize_checkpoint(
        sparse, out, calibration(), masks_of(sparse), PATTERN, params,
        comm=comm or Comm.single(), memory=memory, **options,
    )  # fmt: skip


def digests(out: Path) -> dict[str, str]:
    paths = sorted(out.glob("fragment-*.safetensors"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.fixture(scope="module")
def undisturbed(sparse: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    quantize_to(sparse, out)
    assert len(digests(out)) == NUM_BLOCKS
    return out


@pytest.mark.parametrize(
    ("params", "skip"),
    [
        (PARAMS, []),
        (QuantParams("rtn", "fp8"), ["*.down_proj"]),
        (replace(PARAMS, symmetric=False), ["*.k_proj"]),
    ],
)
def test_streamed_equals_in_memory_and_is_packed_whole(
    sparse, tmp_path, tiny_tokenizer, params, skip
) -> None:
    model, masks = load_model(sparse), masks_of(sparse)
    expected = quantize_model(
        model, calibration(), masks, params, comm=Comm.single(), batch_size=4, skip=skip
    )
    reports = quantize_to(sparse, tmp_path / "out", params=params, skip=skip, activations="disk")
    assert reports == expected.reports
    source = open_source(sparse, "float32")
    scheme = get_scheme(params.scheme)
    fragments = Fragments(tmp_path / "out", lambda width: scheme.stored_as(params, width))
    folder = tmp_path / "packed"
    publish_fragments(folder, source, masks, PATTERN, tiny_tokenizer, fragments)
    assert check_packed(folder)["num_violations"] == 0
    packed = PackedFolder(folder)
    state = model.state_dict()
    for name in packed.shapes():
        assert torch.equal(packed.dense(name, torch.float32), state[name]), name
    for name, layer in packed.contents.layers.items():
        left = skip and name not in expected.layers
        assert layer.scheme.type == ("float" if left else scheme.type)
    assert not any((tmp_path / "out" / "streams").glob("*/*")), "nothing is left behind"
    assert isinstance(source, Source)


def test_killed_at_any_moment_gives_the_same_bytes(sparse, undisturbed, tmp_path) -> None:
    """SIGKILL at random moments; every new process goes on at the block the last one was at."""
    processes = warm_context()
    moments, out, blocks_seen = random.Random(0), tmp_path / "out", []
    while len(blocks_seen) < NUM_KILLS:
        process = processes.Process(target=quantize_to, args=(sparse, out))
        process.start()
        wanted = len(digests(out)) + moments.choice([0, 1, 1])
        while process.is_alive() and len(list(out.glob("fragment-*.safetensors"))) < wanted:
            time.sleep(0.002)
        process.join(moments.uniform(0, 0.2))
        if process.exitcode is None:
            process.kill()
            process.join()
            blocks_seen.append(len(digests(out)))
            continue
        assert process.exitcode == 0, "no failure but ours"
        assert digests(out) == digests(undisturbed)
        out = tmp_path / f"again{len(blocks_seen)}"  # it was done: something new to kill
    quantize_to(sparse, out)
    assert len(set(blocks_seen)) >= 3, f"killed at different blocks: {blocks_seen}"
    assert digests(out) == digests(undisturbed)


def test_finished_blocks_are_not_read_again(sparse, undisturbed, tmp_path, monkeypatch) -> None:
    opened: list[int] = []
    original = BlocksOnDisk.open

    def stop_after_three(self: BlocksOnDisk, index: int):
        opened.append(index)
        if len(opened) == 4:
            raise KeyboardInterrupt
        return original(self, index)

    monkeypatch.setattr(BlocksOnDisk, "open", stop_after_three)
    with pytest.raises(KeyboardInterrupt):
        quantize_to(sparse, tmp_path / "out")
    quantize_to(sparse, tmp_path / "out")
    assert opened == [0, 1, 2, 3, 3, 4, 5]
    assert digests(tmp_path / "out") == digests(undisturbed)


def test_another_batch_size_cannot_continue(sparse, tmp_path) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, _: int) -> None:
        raise Stop

    with pytest.raises(Stop):
        quantize_to(sparse, tmp_path / "out", on_block=stop)
    with pytest.raises(InputError, match=r"resume with the quantize\.batch_size"):
        quantize_to(sparse, tmp_path / "out", batch_size=3)


def worker(rank: int, sparse: str, folder: str) -> None:
    fixed = Comm.distributed(is_fixed=True)
    quantize_to(Path(sparse), Path(folder) / "two", fixed)
    quantize_to(Path(sparse), Path(folder) / "fp8", fixed, FP8)


def test_a_fixed_order_writes_the_same_files_on_two_processes(sparse, tmp_path) -> None:
    assert exit_codes(2, worker, str(sparse), str(tmp_path)) == [0, 0]
    fixed = Comm.single(is_fixed=True)
    quantize_to(sparse, tmp_path / "one", fixed)
    quantize_to(sparse, tmp_path / "fp8-one", fixed, FP8)
    assert digests(tmp_path / "two") == digests(tmp_path / "one")
    assert digests(tmp_path / "fp8") == digests(tmp_path / "fp8-one")
    assert len(digests(tmp_path / "one")) == NUM_BLOCKS
