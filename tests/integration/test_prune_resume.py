"""Pruning a checkpoint block by block: as in memory, killed at any moment, on damaged files."""

from __future__ import annotations

import hashlib
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from sparsify.calibration.hidden_states import Memory
from sparsify.comm import Comm
from sparsify.data.rows import TokenRows
from sparsify.errors import InputError
from sparsify.masks.storage import MaskFile, load_masks, merge_masks
from sparsify.methods import PruneParams, get_method
from sparsify.models.blocks import BlocksOnDisk, reason_to_hold_whole
from sparsify.models.load import load_model
from sparsify.models.save import save_model
from sparsify.pattern import Pattern
from sparsify.pruning.prune import LayerChoice, PruneResult, prune_checkpoint, prune_model
from tests.integration.recoveries import warm_context

NUM_KILLS = 20
PATTERN = Pattern.parse("2:4")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense") / "model"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=10,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    save_model(LlamaForCausalLM(config), None, folder)
    return folder


def calibration() -> TokenRows:
    generator = torch.Generator().manual_seed(1)
    return TokenRows.whole(torch.randint(0, 64, (12, 32), generator=generator))


def prune_to(dense: Path, out: Path, method: str = "sparsegpt", **options: Any) -> PruneResult:
    torch.set_num_threads(1)
    memory = {name: options.pop(name) for name in ("activations", "overlap") if name in options}
    return prune_checkpoint(
        dense, out, calibration(), get_method(method), PATTERN, PruneParams(), comm=Comm.single(),
        memory=Memory(4, **memory), layers=LayerChoice(order=options.pop("order", None)), **options,
    )  # fmt: skip


def digests(out: Path) -> dict[str, str]:
    """Of every file that is a result; times differ, so the state's file is not one."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in out.iterdir()
        if path.is_file() and path.name != "progress.json"
    }


@pytest.fixture(scope="module")
def undisturbed(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    prune_to(dense, out)
    return out


@pytest.mark.parametrize("method", ["sparsegpt", "twofour"])
@pytest.mark.parametrize(
    "options", [{"activations": "device"}, {"activations": "disk"}, {"overlap": True}]
)
def test_streamed_equals_in_memory(dense, tmp_path, method: str, options: dict[str, Any]) -> None:
    model = load_model(dense)
    expected = prune_model(
        model, calibration(), get_method(method), PATTERN, PruneParams(), comm=Comm.single(),
        memory=Memory(4),
    )  # fmt: skip
    result = prune_to(dense, tmp_path / "out", method, **options)
    state = load_model(tmp_path / "out").state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert result.layers == expected.layers
    merge_masks(sorted((tmp_path / "out").glob("masks-*")), tmp_path / "masks.safetensors")
    masks = load_masks(tmp_path / "masks.safetensors")
    assert masks.keys() == expected.keep_masks.keys()
    assert all(torch.equal(masks[name], mask) for name, mask in expected.keep_masks.items())
    assert not any((tmp_path / "out" / "streams").glob("*/*")), "nothing is left behind"


def test_killed_twenty_times_gives_the_same_bytes(dense: Path, undisturbed: Path, tmp_path) -> None:
    """SIGKILL at random moments; every new process goes on at the block the last one was at."""
    processes = warm_context()
    moments, out, blocks_seen = random.Random(0), tmp_path / "out", []

    def num_blocks() -> int:
        return len(list(out.glob("masks-*.safetensors")))

    while len(blocks_seen) < NUM_KILLS:
        process = processes.Process(target=prune_to, args=(dense, out))
        process.start()
        wanted = num_blocks() + moments.choice([0, 0, 1, 2])
        while process.is_alive() and num_blocks() < wanted:
            time.sleep(0.002)
        process.join(moments.uniform(0, 0.3))
        if process.exitcode is None:
            process.kill()
            process.join()
            blocks_seen.append(num_blocks())
            continue
        assert process.exitcode == 0, "no failure but ours"
        assert digests(out) == digests(undisturbed)
        out = tmp_path / f"again{len(blocks_seen)}"  # it was done: something new to kill
    prune_to(dense, out)
    assert len(set(blocks_seen)) >= 4, f"killed at different blocks: {blocks_seen}"
    assert digests(out) == digests(undisturbed)


@pytest.mark.parametrize(("method", "order"), [("twofour", "layer"), ("sparsegpt", "dense")])
def test_stopped_with_a_block_passed_ahead_it_goes_on_with_the_same_bytes(
    dense: Path, tmp_path: Path, method: str, order: str
) -> None:
    class Stop(Exception):
        pass

    def stop_at_four(done: int, _: int) -> None:
        if done == 4:
            raise Stop

    prune_to(dense, tmp_path / "whole", method, order=order)
    with pytest.raises(Stop):
        prune_to(
            dense, tmp_path / "out", method, order=order, overlap=True, on_block=stop_at_four,
            checkpoint_every_blocks=3,
        )  # fmt: skip
    prune_to(dense, tmp_path / "out", method, order=order, overlap=True)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_finished_blocks_are_not_read_again(dense, undisturbed, tmp_path, monkeypatch) -> None:
    opened: list[int] = []
    original = BlocksOnDisk.open

    def stop_after_six(self: BlocksOnDisk, index: int) -> Any:
        opened.append(index)
        if len(opened) == 7:
            raise KeyboardInterrupt
        return original(self, index)

    monkeypatch.setattr(BlocksOnDisk, "open", stop_after_six)
    with pytest.raises(KeyboardInterrupt):
        prune_to(dense, tmp_path / "out")
    prune_to(dense, tmp_path / "out")
    assert opened == [0, 1, 2, 3, 4, 5, 6, 6, 7, 8, 9]
    assert digests(tmp_path / "out") == digests(undisturbed)


def test_rarer_checkpoints_go_back_to_the_last_one(
    dense, undisturbed, tmp_path, monkeypatch
) -> None:
    opened: list[int] = []
    original = BlocksOnDisk.open

    def stop_at_five(self: BlocksOnDisk, index: int) -> Any:
        opened.append(index)
        if len(opened) == 6:
            raise KeyboardInterrupt
        return original(self, index)

    monkeypatch.setattr(BlocksOnDisk, "open", stop_at_five)
    with pytest.raises(KeyboardInterrupt):
        prune_to(dense, tmp_path / "out", checkpoint_every_blocks=3)
    result = prune_to(dense, tmp_path / "out", checkpoint_every_blocks=3)
    assert opened[6:] == [3, 4, 5, 6, 7, 8, 9]
    assert [layer.block for layer in result.layers] == sorted(
        layer.block for layer in result.layers
    )
    assert len(result.layers) == 70
    assert digests(tmp_path / "out") == digests(undisturbed)


def test_damaged_streams_and_other_batches_are_refused(dense, tmp_path, monkeypatch) -> None:
    original = BlocksOnDisk.open

    def stop_at_two(self: BlocksOnDisk, index: int) -> Any:
        if index == 2:
            raise KeyboardInterrupt
        return original(self, index)

    monkeypatch.setattr(BlocksOnDisk, "open", stop_at_two)
    with pytest.raises(KeyboardInterrupt):
        prune_to(dense, tmp_path / "out")
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"cut into 3 batches, now into 6.*batch_size"):
        prune_checkpoint(
            dense, tmp_path / "out", calibration(), get_method("sparsegpt"), PATTERN, PruneParams(),
            comm=Comm.single(), memory=Memory(2),
        )  # fmt: skip
    (part,) = (tmp_path / "out" / "streams" / "before-00002").glob("*.safetensors")
    part.write_bytes(part.read_bytes()[:-10])
    with pytest.raises(InputError, match=r"part-0000.*damaged.*start this pruning over"):
        prune_to(dense, tmp_path / "out")
    part.unlink()
    with pytest.raises(InputError, match="no hidden states of"):
        prune_to(dense, tmp_path / "out")


def test_weights_that_are_no_numbers_are_refused(dense: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    save_model(load_model(dense), None, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.layers\.3\.mlp\.up_proj\.weight are NaN"):
        prune_to(broken, tmp_path / "out")


def test_checkpoints_with_other_names_are_not_streamed(dense: Path, tmp_path: Path) -> None:
    assert reason_to_hold_whole(dense) is None
    renamed = tmp_path / "renamed"
    save_model(load_model(dense), None, renamed)
    tensors = load_file(renamed / "model.safetensors")
    tensors["model.extra.weight"] = tensors.pop("model.layers.9.mlp.up_proj.weight")
    save_file(tensors, renamed / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.9.mlp.up_proj.weight" in str(reason_to_hold_whole(renamed))
    with pytest.raises(InputError, match="load the whole model instead"):
        BlocksOnDisk(renamed)


def test_mask_files_open_one_mask_at_a_time(undisturbed: Path) -> None:
    masks = MaskFile(undisturbed / "masks-00001.safetensors")
    assert len(masks) == 7 and all(mask.dtype == torch.bool for mask in masks.values())


def test_times_add_up(dense: Path, tmp_path: Path) -> None:
    begun_s = time.perf_counter()
    result = prune_to(dense, tmp_path / "out", clock=time.perf_counter)
    total_s = time.perf_counter() - begun_s
    phases = {phase for layer in result.layers for phase in layer.seconds}
    assert phases >= {"load", "statistics", "factor", "solve", "gather", "forward", "write"}
    measured_s = sum(sum(layer.seconds.values()) for layer in result.layers)
    assert 0.5 * total_s < measured_s <= total_s, "phases cover most of the time, none twice"
