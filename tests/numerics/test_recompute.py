"""Recomputing what lies between products: the same gradients, no product more, and less kept."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from functorch.compile import min_cut_rematerialization_partition, nop
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, OPTConfig, Qwen3Config

from jobs.benchmarks.support.families import random_family
from sparsify.costs.shapes import kept_bytes, read_shape
from sparsify.errors import InputError
from sparsify.models.structure import find_blocks
from sparsify.models.training import prepare_student, puts_out_kept, recompute_layers
from sparsify.models.unfuse import unfuse_experts
from sparsify.models.varlen import use_varlen
from tests.families import in_two_documents, tiny, token_rows

TOKENS = 256
SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "max_position_embeddings": 1024,
}  # fmt: skip
GATED = {**SIZES, "intermediate_size": 224, "num_key_value_heads": 1, "head_dim": 16}
CONFIGS = [
    LlamaConfig(**GATED), Qwen3Config(**GATED),
    OPTConfig(**SIZES, ffn_dim=256, word_embed_proj_dim=64, dropout=0.0),
]  # fmt: skip


class _Products(TorchDispatchMode):
    """Counts products of matrices, forward and backward, and attention."""

    num = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num += puts_out_kept(func)
        return func(*args, **(kwargs or {}))


def _trained(model: Any, share: float, recompute: str, by_document: bool) -> tuple[Any, int]:
    """Gradients of two rows of two documents, and the number of products that they took."""
    model = copy.deepcopy(model)
    if by_document:
        use_varlen(model)
    prepare_student(model)
    recompute_layers(model, share, recompute)
    rows = in_two_documents(token_rows(2, 24))
    given = {"input_ids": rows.ids_NT, "position_ids": rows.positions_NT, "use_cache": False}
    with _Products() as seen:
        model(**given).logits.square().sum().backward()
    return {name: param.grad for name, param in model.named_parameters()}, seen.num


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma", "Gemma2", "OPT", "Phi3", "mixtral"])
@pytest.mark.parametrize("by_document", [False, True])
def test_gradients_are_the_same_and_no_product_runs_again(family: str, by_document: bool) -> None:
    if by_document and family in ("Gemma2", "OPT"):
        pytest.skip("does not attend by document")
    model: Any = random_family(family) if family == "mixtral" else tiny(family)
    unfuse_experts(model)
    kept, num_kept = _trained(model, 0.0, "whole", by_document)
    whole, num_whole = _trained(model, 1.0, "whole", by_document)
    assert num_whole > num_kept
    for share in (0.34, 1.0):
        found, num_found = _trained(model, share, "elementwise", by_document)
        assert num_found == num_kept
        for name, grad in kept.items():
            assert torch.equal(grad, found[name]), name
            assert torch.equal(grad, whole[name]), name


def test_attention_without_a_kernel_is_made_again_whole() -> None:
    """Falcon divides its scores in place, where torch does not notice: a kept product of a batch
    would be divided twice."""
    model: Any = random_family("falcon")
    model.config._attn_implementation = "eager"
    kept, num_kept = _trained(model, 0.0, "whole", False)
    found, num_found = _trained(model, 1.0, "elementwise", False)
    assert num_found == num_kept
    for name, grad in kept.items():
        assert torch.equal(grad, found[name]), name


class _Kept:
    """Bytes of a token that a forward of the blocks keeps."""

    def __init__(self, model: Any) -> None:
        self._model, self._before = model, {id(one) for one in _tensors()}
        self._storages: dict[int, int] = {}
        self._held: list[Any] = []

    def note(self, value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        self._held.append(storage)
        self._storages[storage.data_ptr()] = storage.nbytes()
        return value

    def per_token(self) -> float:
        """Of what autograd keeps, and of what torch's selective checkpointing does."""
        for one in _tensors():
            if id(one) not in self._before and not isinstance(one, torch.nn.Parameter):
                self.note(one)
        own = {param.untyped_storage().data_ptr() for param in self._model.parameters()}
        return sum(n for place, n in self._storages.items() if place not in own) / TOKENS


def _tensors() -> list[torch.Tensor]:
    gc.collect()
    return [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]


class _Step:
    """A forward and a backward of a bfloat16 model: what it keeps of a token, and its gradients;
    compiled blocks are traced and split as torch.compile does it, and run as they are."""

    def __init__(self, config: Any, recompute: str | None, compiled: bool) -> None:
        torch.manual_seed(0)
        self.model: Any = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
        unfuse_experts(self.model)
        self.num_products = 0
        prepare_student(self.model)
        recompute_layers(self.model, float(recompute is not None), recompute or "whole")
        if compiled:
            self._compile()
        self._forward().float().square().sum().backward()  # what is compiled, is
        self.model.zero_grad()
        kept = _Kept(self.model)
        with torch.autograd.graph.saved_tensors_hooks(kept.note, lambda value: value):
            out = self._forward()
        self.kept = kept.per_token()
        out.float().square().sum().backward()

    def _compile(self) -> None:
        torch._dynamo.reset()
        backend = aot_autograd(
            fw_compiler=self._count, bw_compiler=self._count,
            partition_fn=min_cut_rematerialization_partition,
            decompositions=select_decomp_table(),
        )  # fmt: skip
        for block in find_blocks(self.model)[1]:
            block.compile(backend=backend)

    def _count(self, graph: Any, inputs: Any) -> Any:
        called = [node.target for node in graph.graph.nodes if node.op == "call_function"]
        self.num_products += sum(map(puts_out_kept, called))
        return nop(graph, inputs)

    def _forward(self) -> torch.Tensor:
        ids = torch.arange(TOKENS)[None] % 96
        states: torch.Tensor = self.model.model(input_ids=ids, use_cache=False).last_hidden_state
        return states


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_kept_is_what_is_planned(config: Any, compiled: bool) -> None:
    shape = read_shape(config)
    everything, whole, found = (
        _Step(config, recompute, compiled) for recompute in (None, "whole", "elementwise")
    )
    # Blocks that keep their inputs alone: the rest is of what is before and after them.
    outside = whole.kept - kept_bytes(shape, 2, 1.0, compiled)[0]
    planned, _ = kept_bytes(shape, 2, 1.0, compiled, "elementwise")
    # Eager code keeps what is planned but for 32 bytes in all; a compiled block 1.4 to 1.7 % less.
    assert found.kept - outside == pytest.approx(planned, rel=0.02 if compiled else 1e-4)
    assert found.kept < everything.kept
    assert found.num_products == everything.num_products
    for name, param in everything.model.named_parameters():
        if param.grad is not None:
            assert torch.equal(param.grad, found.model.get_parameter(name).grad), name
    if compiled:
        assert everything.num_products < whole.num_products


def test_blocks_with_experts_are_not_compiled_where_they_are_recomputed() -> None:
    """Where tokens go is asked in them, which breaks a graph: planned as without compilation."""
    config = MixtralConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    kept, whole, found = (_Step(config, name, True) for name in (None, "whole", "elementwise"))
    assert kept.num_products > 0 == whole.num_products == found.num_products
    shape, ways = read_shape(config), ("whole", "elementwise")
    for way in ways:
        compiled, eager = (kept_bytes(shape, 2, 1.0, is_it, way) for is_it in (True, False))
        assert compiled == eager
    assert kept_bytes(shape, 2, 0.0, True) < kept_bytes(shape, 2, 0.0, False)


def test_one_block_made_again_holds_all_of_it_beside_what_it_keeps() -> None:
    """Eagerly it keeps some of what it makes again, and what no backward asks for."""
    shape = read_shape(CONFIGS[0])
    everything = kept_bytes(shape, 2, 0.0, False)[0] / shape.num_blocks
    assert kept_bytes(shape, 2, 1.0, False, "elementwise")[1] == pytest.approx(everything)


def test_blocks_that_cannot_be_recomputed_are_refused_in_one_line() -> None:
    with pytest.raises(InputError, match=r"^distill.recompute_share=1.0: the blocks of JetMoe"):
        recompute_layers(random_family("jetmoe"), 1.0, "elementwise")
