"""Fixtures that several test modules share: a tiny model folder, and no network."""

from __future__ import annotations

import json
import os
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before any Hugging Face package is imported: a test that reaches for the network must fail.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# A shell starts what it puts in the background with SIGINT ignored, and so are their children.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch

from sparsify.data.rows import TokenRows
from sparsify.pattern import Pattern

torch.set_num_threads(1)

REPOSITORY = Path(__file__).resolve().parent.parent
END_OF_TEXT = "<|endoftext|>"


@pytest.fixture(scope="module", autouse=True)
def no_process_group_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """A group that a module's tests leave in this process would stop the next one that makes its
    own, far from where it came from."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        warnings.warn(f"{request.node.name} left a process group", stacklevel=1)


def equal(first: TokenRows, second: TokenRows) -> bool:
    """Whether two sets of rows are the same."""
    return torch.equal(first.ids_NT, second.ids_NT) and torch.equal(
        first.positions_NT, second.positions_NT
    )


def stage_record(**facts: Any) -> str:
    """The record of a finished stage, as JSON; `facts` replace what it says."""
    empty = {"schema": 1, "identity": {}, "outputs": {}, "metrics": {}, "duration_s": 1.0}
    return json.dumps({**empty, **facts})


def message(error: pytest.ExceptionInfo) -> str:
    """What an error says, which must be one line."""
    text = str(error.value)
    assert "\n" not in text
    return text


def count_violations(weight: torch.Tensor, pattern: Pattern) -> int:
    """Groups (rows for unstructured) of an (O, I) weight with more nonzeros than allowed."""
    width = pattern.m or weight.shape[1]
    return int(((weight != 0).unflatten(1, (-1, width)).sum(-1) > pattern.num_kept(width)).sum())


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """Byte-level BPE with 320 tokens, trained on the golden text, which no change of code moves."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    text = str(REPOSITORY / "tests" / "golden" / "text.py.txt")
    trained.train(text, vocab_size=320, special_tokens=[END_OF_TEXT], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer,
        eos_token=END_OF_TEXT,
        model_max_length=10**9,
    )


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory, tiny_tokenizer) -> Path:
    """A Llama of two blocks with random weights and its tokenizer; read-only, copy to change it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tiny_tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            bos_token_id=None,
            eos_token_id=tiny_tokenizer.eos_token_id,
            tie_word_embeddings=False,
        )
    )
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_model(tiny_model_dir):
    """The model of `tiny_model_dir`, loaded anew for every test."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(tiny_model_dir).eval()


@pytest.fixture
def tiny_rows(tiny_tokenizer) -> TokenRows:
    """12 rows of 32 random tokens, one document each."""
    generator = torch.Generator().manual_seed(1)
    return TokenRows.whole(torch.randint(len(tiny_tokenizer), (12, 32), generator=generator))


@pytest.fixture
def packed_rows(tiny_rows) -> TokenRows:
    """The tokens of `tiny_rows` as documents of 1 to 24 tokens, packed."""
    generator = torch.Generator().manual_seed(2)
    positions_NT = tiny_rows.positions_NT.clone()
    for row in positions_NT:
        for start in torch.randint(1, 32, (2,), generator=generator).sort().values:
            row[start:] = torch.arange(32 - start)
    return TokenRows(tiny_rows.ids_NT, positions_NT)


def pytest_runtest_setup() -> None:
    """torch begins with another seed in every process: a test that fails must fail again."""
    torch.manual_seed(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--update-golden` writes the golden figures instead of only comparing them."""
    parser.addoption("--update-golden", action="store_true", help="write tests/golden anew")
