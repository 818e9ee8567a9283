"""Calibration rows of several documents attend by document where a walk may: the same results."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F

from sparsify.calibration import block
from sparsify.calibration.hidden_states import Memory
from sparsify.comm import Comm
from sparsify.errors import InputError
from sparsify.methods import get_method
from sparsify.models.blocks import BlocksOnDisk
from sparsify.models.structure import base_of
from sparsify.pattern import Pattern
from sparsify.pruning.prune import LayerChoice, prune_checkpoint, prune_model
from tests.families import FEW_STEPS, in_two_documents, tiny, token_rows

ROWS = in_two_documents(token_rows(6))
TWO_FOUR = Pattern.parse("2:4")
WALKS = [("sparsegpt", "block"), ("sparsegpt", "dense"), ("twofour", "layer")]


class Attended:
    """Counts the masks over whole rows that attention was given for batches of rows."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_masks = 0
        attend, length = F.scaled_dot_product_attention, ROWS.ids_NT.shape[1]

        def counted(query, key, value, attn_mask=None, **more):
            self.num_masks += attn_mask is not None and attn_mask.shape[-1] == length
            return attend(query, key, value, attn_mask=attn_mask, **more)

        monkeypatch.setattr(F, "scaled_dot_product_attention", counted)


def pruned(attention, family="Llama", method="sparsegpt", order="block"):
    model = tiny(family)
    before = model.config._attn_implementation
    result = prune_model(
        model, ROWS, get_method(method), TWO_FOUR, FEW_STEPS, comm=Comm.single(),
        memory=Memory(2, attention=attention), layers=LayerChoice(order=order),
    )  # fmt: skip
    assert model.config._attn_implementation == before
    assert not base_of(model)._forward_pre_hooks
    return model.state_dict(), result.keep_masks


def assert_close(found, expected):
    (weights, masks), (other_weights, other_masks) = found, expected
    agreed = [(masks[name] == other_masks[name]).float().mean() for name in masks]
    assert len(agreed) > 5 and min(agreed) > 0.99
    for name, weight in weights.items():
        off = (weight - other_weights[name]).norm() / other_weights[name].norm()
        assert off < (1e-4 if min(agreed) == 1 else 0.1), name


@pytest.mark.parametrize(("method", "order"), WALKS)
def test_by_document_the_results_are_those_of_the_mask(method, order, monkeypatch):
    seen = Attended(monkeypatch)
    expected = pruned("masked", method=method, order=order)
    assert seen.num_masks > 0
    seen.num_masks = 0
    assert_close(pruned("varlen", method=method, order=order), expected)
    assert seen.num_masks == 0


def test_windows_of_attention_are_kept():
    assert_close(pruned("varlen", "Mistral"), pruned("masked", "Mistral"))


def test_a_checkpoint_is_walked_by_document_and_after_a_kill_too(tmp_path, monkeypatch):
    tiny("Llama").save_pretrained(tmp_path / "model")
    seen = Attended(monkeypatch)

    class Killed(Exception):
        pass

    def run(out, attention, stop_after=None):
        def on_block(done, total):
            if done == stop_after:
                raise Killed

        prune_checkpoint(
            tmp_path / "model", tmp_path / out, ROWS, get_method("sparsegpt"), TWO_FOUR, FEW_STEPS,
            comm=Comm.single(), memory=Memory(2, attention=attention), on_block=on_block,
        )  # fmt: skip
        blocks = BlocksOnDisk(tmp_path / out)
        opened = [blocks.open(index).state_dict() for index in range(len(blocks.blocks))]
        return {
            f"{i}.{name}": t.clone() for i, part in enumerate(opened) for name, t in part.items()
        }

    expected = run("masked", "masked")
    seen.num_masks = 0
    found = run("varlen", "varlen")
    with pytest.raises(Killed):
        run("killed", "varlen", stop_after=1)
    again = run("killed", "varlen")
    assert seen.num_masks == 0 and len(found) > 10
    assert all(torch.equal(found[name], again[name]) for name in found)
    assert min(((found[n] == 0) == (expected[n] == 0)).float().mean() for n in found) > 0.99


def test_auto_is_by_document_where_a_gpu_has_a_kernel_and_the_model_allows_it(monkeypatch):
    seen = Attended(monkeypatch)
    pruned("auto")
    assert seen.num_masks > 0  # a CPU has none
    monkeypatch.setattr(block, "has_kernel", lambda device, dtype: True)
    seen.num_masks = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruned("auto")
    assert seen.num_masks == 0
    with pytest.warns(RuntimeWarning, match=r"Gemma2.*a mask keeps its documents apart, which is"):
        found = pruned("auto", "Gemma2")
    expected = pruned("masked", "Gemma2")
    assert all(torch.equal(found[0][name], expected[0][name]) for name in expected[0])


def test_by_document_is_refused_where_the_model_computes_something_else():
    with pytest.raises(InputError, match=r"attention=varlen: Gemma2.*; use masked or auto"):
        pruned("varlen", "Gemma2")
