"""Layers that are quantised as soon as they are pruned: the files, kills, and what is left out."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from sparsify.calibration.hidden_states import Memory
from sparsify.comm import Comm
from sparsify.data.rows import TokenRows
from sparsify.errors import InputError
from sparsify.formats.kinds.packed import Fragments, publish_fragments
from sparsify.formats.source import open_source
from sparsify.formats.verify import check_packed
from sparsify.masks.storage import MaskFile, merge_masks
from sparsify.methods import PruneParams, get_method
from sparsify.models.save import save_model
from sparsify.packed.layer import unpack_layer
from sparsify.packed.layout import Layer
from sparsify.params import QuantParams
from sparsify.pattern import Pattern
from sparsify.pruning.one_pass import FOLDER, OnePass
from sparsify.pruning.prune import PruneResult, prune_checkpoint
from sparsify.quantization.schemes import get_scheme

PATTERN = Pattern.parse("2:4")
PARAMS = QuantParams(group_size=32, num_refine_sweeps=2, num_scale_steps=4)
NUM_BLOCKS = 4


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=NUM_BLOCKS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("dense") / "model"
    save_model(LlamaForCausalLM(config), tiny_tokenizer, folder)
    return folder


def prune(
    dense: Path, out: Path, method: str = "sparsegpt", params: QuantParams | None = PARAMS,
    skip: tuple[str, ...] = (), comm: Comm | None = None, **options: Any,
) -> PruneResult:  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    rows = TokenRows.whole(torch.randint(0, 320, (16, 32), generator=generator))
    return prune_checkpoint(
        dense, out, rows, get_method(method), PATTERN, PruneParams(), comm=comm or Comm.single(),
        memory=Memory(4), one_pass=OnePass(params, skip) if params else None, **options,
    )  # fmt: skip


def weights(out: Path) -> dict[str, Tensor]:
    files = (load_file(path) for path in sorted(out.glob("model-*.safetensors")))
    return dict(itertools.chain.from_iterable(tensors.items() for tensors in files))


def digests(out: Path) -> dict[str, str]:
    paths = [*out.glob("m*.safetensors"), *(out / FOLDER).iterdir()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.mark.parametrize(
    ("method", "params"),
    [("sparsegpt", PARAMS), ("twofour", PARAMS), ("magnitude", QuantParams(method="rtn")),
     ("sparsegpt", QuantParams(scheme="fp8"))],
    ids=["sparsegpt", "twofour", "rtn", "fp8"],
)  # fmt: skip
def test_the_weights_are_those_of_the_codes(
    method: str, params: QuantParams, dense: Path, tmp_path: Path
) -> None:
    out, scheme = tmp_path / "out", get_scheme(params.scheme)
    result = prune(dense, out, method, params)
    plain = prune(dense, tmp_path / "plain", method, None)
    merge_masks(sorted(out.glob("masks-*.safetensors")), out / "masks.safetensors")
    masks, found = MaskFile(out / "masks.safetensors"), weights(out)
    fragments = Fragments(out / FOLDER, lambda width: scheme.stored_as(params, width))
    for report, before in zip(result.layers, plain.layers, strict=True):
        weight_OI, name = found[f"{report.name}.weight"], report.name
        stored = Layer(report.shape, fragments.scheme_of(report.shape[1]), PATTERN)
        unpacked_OI = unpack_layer(stored, fragments.parts(name), torch.float32)
        assert torch.equal(unpacked_OI, weight_OI), name
        assert not weight_OI[~masks[name]].any()
        assert report.rounding_error is not None and report.rounding_error > 0
        assert before.rounding_error is None
    # The first layers see the same inputs either way; rounding is not free.
    assert result.layers[0].error > plain.layers[0].error


def test_it_becomes_a_packed_folder(dense: Path, tmp_path: Path, tiny_tokenizer: Any) -> None:
    out, packed = tmp_path / "out", tmp_path / "packed"
    prune(dense, out, skip=("*.down_proj",))
    merge_masks(sorted(out.glob("masks-*.safetensors")), out / "masks.safetensors")
    scheme = get_scheme("int4")
    fragments = Fragments(out / FOLDER, lambda width: scheme.stored_as(PARAMS, width))
    assert "model.layers.0.mlp.up_proj" in fragments
    assert "model.layers.0.mlp.down_proj" not in fragments
    masks = MaskFile(out / "masks.safetensors")
    publish_fragments(
        packed, open_source(out, "float32"), masks, PATTERN, tiny_tokenizer, fragments
    )
    assert check_packed(packed)["num_layers"] == 7 * NUM_BLOCKS


@pytest.mark.parametrize("killed_after", [1, 3])
def test_killed_and_continued_it_writes_the_same_bytes(
    killed_after: int, dense: Path, tmp_path: Path
) -> None:
    prune(dense, tmp_path / "undisturbed")

    def kill(done: int, total: int) -> None:
        if done == killed_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(dense, tmp_path / "out", on_block=kill)
    (tmp_path / "out" / FOLDER / f"fragment-{killed_after:05d}.safetensors").stat()
    result = prune(dense, tmp_path / "out")
    assert digests(tmp_path / "out") == digests(tmp_path / "undisturbed")
    assert len([one for one in result.layers if one.rounding_error]) == 7 * NUM_BLOCKS


def test_a_glob_that_names_no_layer_is_refused(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"quantize\.skip"):
        prune(dense, tmp_path / "out", skip=("*.no_such",))
