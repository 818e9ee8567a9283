"""Attention by document: equal to the mask, blind to other documents, and refused where it is not.

The GPU's side runs here too: PyTorch's own `varlen_attn` with its signature, its autograd and its
shapes, over a kernel of a few lines that follows the documentation. Only the kernel itself is not.
"""

from __future__ import annotations

import copy
import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch.nn.attention import varlen as torch_varlen
from transformers import AutoModelForCausalLM

from sparsify.data.rows import TokenRows
from sparsify.distillation.head_loss import Teacher
from sparsify.distillation.student import DistillStudent
from sparsify.errors import InputError
from sparsify.models import varlen, varlen_check
from sparsify.models.calls import first_block_alone, run_model
from sparsify.models.lm_head import check_head
from sparsify.models.training import prepare_student, recompute_layers
from sparsify.models.varlen import (
    VARLEN,
    end_to_end,
    find_documents,
    use_varlen,
)
from sparsify.models.varlen_check import check_varlen, choose_attention
from sparsify.params import LossWeights
from tests.families import FAMILIES, tiny, token_rows
from tests.unit.sparsify.test_isolation import tiny as tiny_of_type

REFUSED = {"Gemma2": "it uses softcap", "OPT": "does not hand on where documents begin"}
ALLOWED = [family for family in FAMILIES if family not in REFUSED]
LENGTHS = [(5, 1, 9, 9), (24,), (10, 14)]  # windows of the tiny models are 6 tokens


def packed_rows(lengths=LENGTHS, seed: int = 1) -> TokenRows:
    ids_NT = token_rows(len(lengths), sum(lengths[0]), seed).ids_NT
    return TokenRows(
        ids_NT, torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    )


def logits(model, rows: TokenRows) -> torch.Tensor:
    inputs = {"input_ids": rows.ids_NT, "position_ids": rows.positions_NT, "use_cache": False}
    return model(**inputs).logits


def pair(family: str, dtype: torch.dtype = torch.float64):
    """A model with its mask, and the same by document."""
    masked = tiny(family).to(dtype)
    for parameter in masked.parameters():  # zero biases and unit gains would hide mistakes
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    by_document = copy.deepcopy(masked)
    check_varlen(by_document)
    use_varlen(by_document)
    return masked, by_document


def gradients(model, rows: TokenRows) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    weights = torch.randn(3, 24, 64, generator=torch.Generator().manual_seed(3)).double()
    (logits(model, rows) * weights.to(model.dtype)).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same_model(masked, by_document, rows: TokenRows) -> None:
    expected = logits(masked, rows)
    # Measured 5e-16 and 2e-14 of the largest number: float64 sums in another order.
    assert (logits(by_document, rows) - expected).abs().max() < 1e-13 * expected.abs().max()
    right, found = gradients(masked, rows), gradients(by_document, rows)
    assert right.keys() == found.keys()
    for name, gradient in right.items():
        # The bias of keys has no gradient in theory: what is left of it is rounding.
        size = max(gradient.abs().max().item(), 1e-3)
        assert (found[name] - gradient).abs().max() < 1e-12 * size, name


# --- documents of rows


def test_documents_begin_where_positions_do_not_go_on():
    positions_NT = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5], [3, 4, 9, 10, 0, 0]])
    found = find_documents(positions_NT)
    assert found.cu_seqlens_K.tolist() == [0, 3, 5, 6, 12, 14, 16, 17, 18]
    assert found.cu_seqlens_K.dtype == torch.int32
    assert found.max_length == 6


def test_one_row_of_one_token():
    found = find_documents(torch.tensor([[0]]))
    assert (found.cu_seqlens_K.tolist(), found.max_length) == ([0, 1], 1)


def test_documents_are_those_of_the_mask():
    from transformers.masking_utils import find_packed_sequence_indices

    generator = torch.Generator().manual_seed(0)
    positions_NT = torch.randint(0, 3, (50, 9), generator=generator).cumsum(1) % 5
    numbers_NT = find_packed_sequence_indices(positions_NT)
    expected = [0]
    for row in numbers_NT:
        expected += (torch.unique_consecutive(row, return_counts=True)[1]).tolist()
    expected_K = torch.tensor(expected).cumsum(0)
    assert find_documents(positions_NT).cu_seqlens_K.tolist() == expected_K.tolist()


def test_rows_are_laid_end_to_end():
    heads_NHTD = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    packed_PHD = end_to_end(heads_NHTD)
    assert packed_PHD.shape == (8, 3, 5)
    for row in range(2):
        for token in range(4):
            assert torch.equal(packed_PHD[4 * row + token], heads_NHTD[row, :, token])


# --- the same as with the mask


@pytest.mark.parametrize("family", ALLOWED)
def test_logits_and_gradients_are_those_of_the_mask(family):
    assert_same_model(*pair(family), packed_rows())


def test_no_mask_is_built(monkeypatch):
    from transformers import masking_utils

    _, model = pair("Mistral")

    def fail(*args, **kwargs):
        raise AssertionError("a mask is built")

    for name in ("sdpa_mask", "eager_mask", "find_packed_sequence_indices"):
        monkeypatch.setattr(masking_utils, name, fail)
    monkeypatch.setattr(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS, "_local_mapping", {
        "sdpa": fail, "eager": fail})  # fmt: skip
    logits(model, packed_rows())
    model.config._attn_implementation = "sdpa"
    with pytest.raises(AssertionError, match="a mask is built"):
        logits(model, packed_rows())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ALLOWED)
def test_other_documents_change_no_bit(family, dtype):
    _, model = pair(family, dtype)
    rows = packed_rows()
    with torch.no_grad():
        before = logits(model, rows)
        for row, lengths in enumerate(LENGTHS):
            ends = torch.tensor(lengths).cumsum(0).tolist()
            for start, end in zip([0, *ends[:-1]], ends, strict=True):
                changed = (rows.ids_NT + 17) % 64
                changed[row, start:end] = rows.ids_NT[row, start:end]
                after = logits(model, TokenRows(changed, rows.positions_NT))
                assert torch.equal(after[row, start:end], before[row, start:end])
                assert not torch.equal(after, before)


def test_rows_of_one_document_need_no_positions():
    masked, model = pair("Llama")
    ids_NT = packed_rows().ids_NT
    expected = logits(masked, TokenRows.whole(ids_NT))
    for found in (logits(model, TokenRows.whole(ids_NT)), model(ids_NT, use_cache=False).logits):
        assert (found - expected).abs().max() < 1e-13 * expected.abs().max()


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_recomputed_layers_use_the_documents_of_their_own_rows(share):
    """Two batches are run before either goes back, so the last one's documents are not enough."""
    _, plain = pair("Llama")
    recomputed = copy.deepcopy(plain)
    assert recompute_layers(recomputed, share)
    both = [packed_rows(), packed_rows([(4, 20), (12, 12), (1, 23)], seed=2)]
    for model in (plain, recomputed):
        prepare_student(model)
        first, second = (logits(model, rows).square().sum() for rows in both)
        first.backward()
        second.backward()
    for name, parameter in plain.named_parameters():
        assert torch.equal(recomputed.get_parameter(name).grad, parameter.grad), name


def test_the_student_of_a_recovery_has_the_same_loss():
    masked, by_document = pair("Qwen2")
    rows = packed_rows()
    teacher = tiny("Qwen2", seed=5).double()
    taught = copy.deepcopy(teacher)
    use_varlen(taught)
    losses = []
    for model, dense in ((masked, teacher), (by_document, taught)):
        head = check_head(dense)
        with torch.no_grad():
            states = head.base(
                input_ids=rows.ids_NT, position_ids=rows.positions_NT, use_cache=False,
                output_hidden_states=True,
            )  # fmt: skip
        student = DistillStudent(model)
        loss, _ = student(
            rows, LossWeights(kl=1.0, square_head=1.0),
            teacher=Teacher(states.last_hidden_state, head.plain()),
            teacher_states=states.hidden_states,
        )  # fmt: skip
        losses.append(loss.item())
    # The KL is float32 whatever the states are.
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_saved_model_is_loaded_without_it(tmp_path):
    masked, model = pair("Mistral", torch.float32)
    model.save_pretrained(tmp_path)
    assert VARLEN not in (tmp_path / "config.json").read_text()
    assert not [key for key in json.loads((tmp_path / "config.json").read_text()) if "attn" in key]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    assert torch.equal(logits(loaded, packed_rows()), logits(masked, packed_rows()))
    assert model.config._attn_implementation == VARLEN


# --- the GPU's side


def documents_of(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal, scale, window):
    """Every document's queries, keys and values, and its shares of attention (H, L, L).

    As the documentation of flash attention has it: query t sees keys t - left to t + right of its
    document, and -1 is no limit; a key head serves a group of consecutive query heads.
    """
    assert query.shape[0] == key.shape[0] == value.shape[0] == cu_seq_q[-1] == cu_seq_k[-1]
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    lengths = cu_seq_q.diff().tolist()
    assert (max_q, max_k) == (max(lengths), max(cu_seq_k.diff().tolist()))
    left, right = window
    assert is_causal == ((left, right) == (-1, 0))
    scale = query.shape[2] ** -0.5 if scale is None else scale
    groups = query.shape[1] // key.shape[1]
    for q, k, v in zip(*(x.split(lengths) for x in (query, key, value)), strict=True):
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        distance = torch.arange(len(q))[:, None] - torch.arange(len(q))
        is_seen = torch.ones_like(distance, dtype=torch.bool)
        is_seen &= (left < 0) | (distance <= left)
        is_seen &= (right < 0) | (-distance <= right)
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        yield q, k, v, scores.masked_fill(~is_seen, -math.inf).softmax(-1), scale


def flash_forward(query, key, value, *where_and_rest):
    parts = documents_of(query, key, value, *where_and_rest[:7])
    output = torch.cat([torch.einsum("hqk,khd->qhd", p, v) for _, _, v, p, _ in parts])
    lse = torch.zeros(query.shape[1], len(query))
    return output, lse, torch.zeros(2, dtype=torch.uint64)


def flash_backward(
    grad_out, query, key, value, out, lse, cu_seq_q, cu_seq_k, max_q, max_k, is_causal, rng_state,
    scale, window,
):  # fmt: skip
    """The chain rule through softmax(scale q k^T) v; operators' kernels run without autograd."""
    where = cu_seq_q, cu_seq_k, max_q, max_k, is_causal, scale, window
    grads = []
    parts = documents_of(query, key, value, *where)
    for go, (q, k, v, p, s) in zip(grad_out.split(cu_seq_q.diff().tolist()), parts, strict=True):
        grad_p = torch.einsum("qhd,khd->hqk", go, v)
        grad_s = s * p * (grad_p - (grad_p * p).sum(-1, keepdim=True))
        grads.append((
            torch.einsum("hqk,khd->qhd", grad_s, k), torch.einsum("hqk,qhd->khd", grad_s, q),
            torch.einsum("hqk,qhd->khd", p, go),
        ))  # fmt: skip
    grad_q, grad_k, grad_v = (torch.cat(x) for x in zip(*grads, strict=True))
    shared = (key.shape[1], query.shape[1] // key.shape[1])
    return grad_q, grad_k.unflatten(1, shared).sum(2), grad_v.unflatten(1, shared).sum(2)


@pytest.fixture(scope="module")
def kernels():
    """PyTorch's two operators with kernels for the CPU, which they lack."""
    torch_varlen._varlen_attn.register_kernel("cpu", flash_forward)
    torch_varlen._varlen_attn_backward.register_kernel("cpu", flash_backward)


@pytest.fixture
def on_gpu(kernels, monkeypatch):
    monkeypatch.setattr(varlen, "has_kernel", lambda device, dtype: True)


@pytest.mark.parametrize("family", ALLOWED)
def test_the_kernel_is_called_as_it_is_documented(family, on_gpu):
    """Layout, lengths, scale, shared key heads (2 for 4) and windows, forward and backward."""
    assert_same_model(*pair(family), packed_rows())


def test_the_kernel_recomputes(on_gpu):
    masked, model = pair("Mistral")
    model.train()
    recompute_layers(model, 1.0)
    assert_same_model(masked, model, packed_rows())


def test_the_documents_are_looked_for_once_per_call(on_gpu, monkeypatch):
    _, model = pair("Llama")
    calls = []
    monkeypatch.setattr(
        varlen, "find_documents", lambda positions: calls.append(0) or find_documents(positions)
    )
    logits(model, packed_rows())
    assert len(calls) == 1


def test_positions_that_are_in_host_memory_are_not_copied_back(monkeypatch):
    """Rows went to a device from which nothing can be copied; layers get what was found before."""
    masked, model = pair("Llama")
    rows = packed_rows().to("meta")
    with pytest.raises(NotImplementedError):
        rows.positions_NT.cpu()
    assert varlen.documents_of(masked.model, rows) == {}
    for part, lengths in zip(rows.split(1), LENGTHS, strict=True):
        found = varlen.documents_of(model.model, part)
        assert found["cu_seq_lens_q"].tolist() == [0, *itertools.accumulate(lengths)]
        assert found["max_length_q"] == max(lengths)
    given, rows = varlen.documents_of(model.model, rows), packed_rows()
    expected = logits(model, rows)
    monkeypatch.setattr(varlen, "find_documents", None)
    found = run_model(model.model, rows, **given).last_hidden_state
    assert torch.equal(model.lm_head(found), expected)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_layers_compile_whole_and_serve_every_batch(share, on_gpu):
    masked, model = pair("Mistral")
    model.train()
    recompute_layers(model, share)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for block in model.model.layers:
        block.compile(backend="aot_eager", fullgraph=share == 0)
    batches = [LENGTHS, [(4, 20), (12, 12), (1, 23)], [(24,)] * 3, [(3, 3, 18), (6, 18), (24,)]]
    seen = []
    for number, lengths in enumerate(batches):
        assert_same_model(masked, model, packed_rows(lengths, seed=number))
        seen.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert not torch._dynamo.utils.counters["graph_break"]
    # One graph for the first numbers, one for any number of documents and any longest one.
    assert seen[-1] == seen[1] <= 2
    torch._dynamo.reset()


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_compiled_layers_run_one_document_after_another_uncompiled(share):
    masked, model = pair("Mistral")
    model.train()
    recompute_layers(model, share)
    torch._dynamo.reset()
    for block in model.model.layers:
        block.compile(backend="aot_eager")
    for number, lengths in enumerate([LENGTHS, [(4, 20), (12, 12), (1, 23)], [(24,)] * 3]):
        assert_same_model(masked, model, packed_rows(lengths, seed=number))
    torch._dynamo.reset()


def test_a_kernel_that_computes_something_else_is_refused(kernels, monkeypatch):
    """A model held in float32 that is to train in bfloat16: only then the kernel is asked."""
    for module in (varlen, varlen_check):
        monkeypatch.setattr(module, "has_kernel", lambda device, dtype: dtype == torch.bfloat16)
    model = tiny("Mistral")
    check_varlen(model, in_half=True)
    right = torch_varlen.varlen_attn

    def of_scale(*args, scale, **kwargs):
        return right(*args, scale=1.2 * scale, **kwargs)

    monkeypatch.setattr(torch_varlen, "varlen_attn", of_scale)
    with pytest.raises(InputError, match=r"MistralForCausalLM: varlen_attn is off by 0"):
        check_varlen(model, in_half=True)

    def of_window(*args, window_size, **kwargs):
        return right(*args, window_size=(window_size[0] + 1, 0), **kwargs)

    monkeypatch.setattr(torch_varlen, "varlen_attn", of_window)
    with pytest.raises(InputError, match=r"varlen_attn is off by 0"):
        check_varlen(model, in_half=True)

    def failing(*args, **kwargs):
        raise RuntimeError("head dimension 8 is not there\nmore")

    monkeypatch.setattr(torch_varlen, "varlen_attn", failing)
    with pytest.raises(InputError, match=r"cannot compute its attention \(head .* not there\)$"):
        check_varlen(model, in_half=True)
    check_varlen(model, in_half=False)


def test_only_gpus_in_half_precision_have_the_kernel():
    found = {
        (device, dtype): varlen.has_kernel(torch.device(device), dtype)
        for device in ("cpu", "cuda")
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert [where for where, has in found.items() if has] == [("cuda", torch.bfloat16)]


# --- refused


@pytest.mark.parametrize("family", REFUSED)
def test_families_that_want_more_are_refused(family):
    model = tiny(family).train()
    before = model.config._attn_implementation
    with pytest.raises(InputError, match=f"{family}Attention: .*{REFUSED[family]}"):
        check_varlen(model)
    assert model.config._attn_implementation == before
    assert model.training
    assert not model.base_model._forward_pre_hooks


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("gpt_oss", {"num_local_experts": 4, "head_dim": 8}, "it uses s_aux"),
        ("mpt", {"d_model": 32, "n_heads": 4}, "MptForCausalLM: fails without a mask"),
        ("llama4_text", {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 32,
                         "attention_chunk_size": 6}, "layers of a kind that is not known"),
        # Its mask has the window, and its layers do not say so: longer than the rows tried.
        ("phimoe", {"num_local_experts": 4, "sliding_window": 4096},
         r"windows \(None, None\), its config says \(4096, 4096\)"),
    ],
)  # fmt: skip
def test_what_is_not_here_is_refused(kind, changes, message):
    with pytest.raises(InputError, match=message):
        check_varlen(tiny_of_type(kind, changes))


def llama_with(change):
    """A Llama whose layers call attention with something else."""
    model = tiny("Llama")
    attention = model.model.layers[1].self_attn
    forward = attention.forward
    attention.forward = lambda *args, **kwargs: forward(*args, **change(kwargs))
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda kw: {**kw, "attention_mask": torch.ones(2, 1, 20, 20)}, "a mask of its own"),
        (lambda kw: {**kw, "is_causal": False}, "it is not causal"),
        (lambda kw: {**kw, "position_bias": torch.zeros(1)}, "it uses position_bias"),
        (lambda kw: {**kw, "cu_seq_lens_q": None}, "does not hand on"),
        (lambda kw: {**kw, "sliding_window": 6}, r"windows \(None, 6, None\)"),
        (lambda kw: {**kw, "cu_seq_lens_q": torch.tensor([0, 20, 40])}, "outputs are others"),
    ],
)
def test_layers_that_differ_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        check_varlen(llama_with(change))


def test_layers_that_do_not_call_attention_are_refused():
    model = tiny("Llama")
    attention = model.model.layers[1].self_attn

    def own(hidden_states, position_embeddings, attention_mask=None, **kwargs):
        shape = (*hidden_states.shape[:-1], -1, attention.head_dim)
        q, k, v = (
            getattr(attention, f"{name}_proj")(hidden_states).view(shape).transpose(1, 2)
            for name in "qkv"
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return attention.o_proj(out.transpose(1, 2).flatten(2)), None

    attention.forward = own
    with pytest.raises(InputError, match=r"windows \(None, None\), .* \(None, None, None\)"):
        check_varlen(model)


def test_a_model_of_which_one_block_is_there_is_tried_with_that(monkeypatch):
    model = tiny("Mistral")
    for block in model.model.layers[1:]:
        block.to("meta")
    with first_block_alone(model):
        check_varlen(model)
    mixed = tiny("Qwen2")
    mixed.config.layer_types[1] = "sliding_attention"
    with first_block_alone(mixed), pytest.raises(InputError, match="its layers differ"):
        check_varlen(mixed)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"attention_mask": torch.ones(2, 16)}, "given attention_mask; give position_ids"),
        ({"past_key_values": transformers.DynamicCache()}, "given past_key_values"),
    ],
)
def test_masks_and_caches_are_refused(given, message):
    _, model = pair("Llama")
    with pytest.raises(InputError, match=f"LlamaModel: attends by document.*{message}"):
        model(input_ids=token_rows(2).ids_NT, **given)


def test_dropout_is_refused():
    _, model = pair("Llama")
    model.train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(InputError, match=r"drops out 0\.1"):
        logits(model, packed_rows())
    prepare_student(model)
    logits(model, packed_rows())


# --- the choice


def chosen(families: list[str], wanted: str, is_joined: bool = True) -> tuple[list[bool], list]:
    models, said = [tiny(family) for family in families], []
    for model in models:
        choose_attention(model, wanted, is_joined, False, said.append)
    return [model.config._attn_implementation == VARLEN for model in models], said


def test_auto_is_by_document_where_the_model_allows_it_and_says_where_not():
    found, said = chosen(["Llama", "Gemma2"], "auto")
    assert found == [True, False]
    assert len(said) == 1
    assert "Gemma2Attention: attention by document cannot replace it, it uses softcap" in said[0]
    assert said[0].endswith("a mask keeps its documents apart, which is slower")


def test_rows_of_one_document_stay_with_plain_causal_attention():
    assert chosen(["Llama", "Gemma2"], "auto", is_joined=False) == ([False, False], [])
    assert chosen(["Llama"], "varlen", is_joined=False) == ([True], [])


def test_masked_is_masked():
    assert chosen(["Llama"], "masked") == ([False], [])


def test_varlen_is_refused_where_it_would_be_wrong():
    with pytest.raises(InputError, match=r"attention=varlen: Gemma2.*use masked or auto"):
        chosen(["Llama", "Gemma2"], "varlen")
