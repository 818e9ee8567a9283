"""A model folder's tokenizer: whether it follows the rules of its own tokenizer.json.

For many families transformers takes from tokenizer.json the vocabulary alone and makes the rules
(how text is cut, what spaces become) from the family's code. For a file that was made by other
rules, such as a Llama's in a folder that says qwen2, the ids are then others than those the model
was trained with, and nothing looks wrong but its perplexity.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

_FILE = "tokenizer.json"

# What rules are known to differ in: spaces, line ends, digits, contractions, cases, scripts,
# composed letters. No special tokens: what is around them is a family's business.
_AWKWARD = (
    "The quick brown fox JUMPS over 13 lazy dogs; it's 3.14159 o'clock, isn't it?",
    "  two leading  and   three inner spaces, \t a tab\n\n\nand empty lines \r\n at the end  \n",
    "def f(x_1):\n        return x_1 ** 2  # CamelCase, snake_case, don't, We'LL, ALLCAPS\n",
    "Ärger über Straßen, déjà vu, nai\u0308ve fi\u0301ne; 1234567890 0x1F -- ... !!! {} [] () <>",
    "Привет, мир! 你好，世界。こんにちは 안녕하세요 مرحبا שלום नमस्ते 😀👍🏽 ∑∫≠ x\u00a0y\u200bz",
)

_SHOWN = 8
"""ids in a message"""


def by_own_rules(
    folder: Path, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedTokenizerBase, str | None]:
    """The tokenizer that does what the folder's tokenizer.json says.

    Args:
        folder: of the model.
        tokenizer: as transformers makes it for the model's family.

    Returns:
        It, where both give the same ids for some awkward texts or there is no such file; else one
        with the file's rules and tokenizer_config.json's special tokens, and a sentence on that.

    Cost: reads the file once more, unless the family has no rules of its own.
    """
    if type(tokenizer) is PreTrainedTokenizerFast or not (folder / _FILE).is_file():
        return tokenizer, None
    own = PreTrainedTokenizerFast.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    text = first_difference(tokenizer, own, _AWKWARD)
    if text is None:
        return tokenizer, None
    return own, (
        f"tokenizer.json is used by its own rules: transformers would make a "
        f"{type(tokenizer).__name__} of it, which gives other ids "
        f"({difference(tokenizer, own, text)}); load what is made with it by "
        "PreTrainedTokenizerFast.from_pretrained"
    )


def first_difference(
    one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, texts: Iterable[str]
) -> str | None:
    """The first text that the two encode differently, without special tokens around it."""
    return next((text for text in texts if _ids(one, text) != _ids(other, text)), None)


def difference(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, text: str) -> str:
    """How the two encode a text that they encode differently, from the place on."""
    ids, others = _ids(one, text), _ids(other, text)
    same = next(
        (i for i, (a, b) in enumerate(zip(ids, others, strict=False)) if a != b),
        min(len(ids), len(others)),
    )
    part = slice(same, same + _SHOWN)
    return f"{ids[part]} in place of {others[part]} from token {same} of {text[:24]!r} on"


def beyond_embedding(tokenizer: PreTrainedTokenizerBase, num_rows: int) -> dict[str, int]:
    """Token -> id of every token that an embedding of `num_rows` rows has no place for, by id."""
    found = sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= num_rows)
    return {token: i for i, token in found}


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
