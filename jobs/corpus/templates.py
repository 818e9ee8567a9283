"""Conversations as a model reads them: chat templates, and which tokens are the answers.

A template that marks its answers (`{% generation %}`) is asked for them. Of any other, a
conversation is rendered up to before each answer and up to its end: what the second has more is the
answer. Where one is not the beginning of the other, nobody knows what the answer is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from jobs.corpus.chats import Chats
from jobs.corpus.documents import Remarks
from jobs.corpus.turns import Turn
from sparsify.data.examples import Example
from sparsify.errors import InputError, first_line

_RAW = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)

_ALPACA = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}"
    "{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '### Response:\\n' + message['content'] + eos_token }}"
    "{% if not loop.last %}{{ '\\n\\n' }}{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
)

BUILT_IN = {"raw": _RAW, "alpaca": _ALPACA}
"""name -> template for models that have none: contents one after another; Alpaca's headings"""

_MARKED = re.compile(r"\{%-?\s*generation\b")

LONG = "records longer than a row, left out"

EMPTY = "records of whose answer no token is learned, left out"


def template_of(tokenizer: PreTrainedTokenizerBase, given: str | None) -> str:
    """The text of the template that a model is trained with.

    Args:
        tokenizer: of the model; its own template is taken where none is given.
        given: a name of `BUILT_IN`, a file, or None.

    Raises:
        InputError: there is none; or the file cannot be read.
    """
    if given in BUILT_IN:
        if tokenizer.eos_token is None:
            raise InputError(
                f"finetune.template={given}: ends answers with the tokenizer's end token, and it "
                "has none; give a template of your own with finetune.template=FILE.jinja"
            )
        ids, begin = tokenizer("x")["input_ids"], tokenizer.bos_token_id
        starts = begin is not None and ids[:1] == [begin]
        return ("{{ bos_token }}" if starts else "") + BUILT_IN[given]
    if given is not None:
        try:
            return Path(given).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"finetune.template={given}: cannot be read ({first_line(error)}); give a file "
                f"with a Jinja template, or one of {', '.join(BUILT_IN)}"
            ) from None
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    if not own:
        raise InputError(
            "finetune.template: the model's tokenizer has no chat template; give one with "
            f"finetune.template=FILE.jinja, or one of {', '.join(BUILT_IN)}"
        )
    return str(own)


class Renderer:
    """Makes examples of conversations.

    Args:
        tokenizer: of the model.
        template: from `template_of`.

    Raises:
        InputError: the tokenizer does not say where in a text its tokens lie.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
        if not tokenizer.is_fast:
            raise InputError(
                "finetune: the model's tokenizer does not say where in a text its tokens lie; save "
                "it as tokenizer.json: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(...)"
            )
        self._tokenizer, self._template = tokenizer, template
        self._marks = _MARKED.search(template) is not None
        self.how = (
            "as it marks them" if self._marks else "by what each adds to the conversation before it"
        )
        """how answers are found"""

    def example(self, turns: Sequence[Turn], place: str) -> Example:
        """Token ids of a conversation, its answers marked.

        Raises:
            InputError: the template refuses a turn or leaves one out, or it cannot be said which
                part is the answer.
        """
        text = self._rendered(turns, place)
        for turn in turns:
            if turn["content"].strip() not in text:
                raise InputError(
                    f"{place}: the chat template leaves out the turn of role {turn['role']!r}; "
                    "take such turns out, or give a template that knows the role "
                    "(finetune.template=)"
                )
        if self._marks:
            found: Any = self._tokenizer.apply_chat_template(
                list(turns), chat_template=self._template, tokenize=True, return_dict=True,
                return_assistant_tokens_mask=True,
            )  # fmt: skip
            ids, is_answer = found["input_ids"], found["assistant_masks"]
        else:
            ids, is_answer = self._by_prefix(turns, text, place)
        return Example(np.array(ids, dtype=np.int64), np.array(is_answer, dtype=bool))

    def _rendered(self, turns: Sequence[Turn], place: str, asks: bool = False) -> str:
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    list(turns), chat_template=self._template, tokenize=False,
                    add_generation_prompt=asks,
                )
            )  # fmt: skip
        except Exception as error:  # whatever a template raises
            raise InputError(
                f"{place}: the chat template cannot render it ({first_line(error)}); correct the "
                "record, or give another template with finetune.template="
            ) from None

    def _by_prefix(
        self, turns: Sequence[Turn], text: str, place: str
    ) -> tuple[list[int], list[bool]]:
        """Ids and marks of what each answer adds to the text before it."""
        spans = []
        for number, turn in enumerate(turns):
            if turn["role"] != "assistant" or not turn["content"]:
                continue
            before = self._rendered(turns[:number], place, asks=True)
            after = self._rendered(turns[: number + 1], place) if turns[number + 1 :] else text
            if not (text.startswith(after) and after.startswith(before)):
                raise InputError(
                    f"{place}: rendered up to turn {number + 1} the conversation does not begin as "
                    "it does in full, so that nobody knows which part is the answer; mark it in "
                    "the template with {% generation %}, or train on single turns"
                )
            spans.append((len(before), len(after)))
        found = self._tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        is_answer = [
            any(begin < stop and start < end for start, stop in spans)
            for begin, end in found["offset_mapping"]
        ]
        return found["input_ids"], is_answer

    def shown(self, example: Example, begin: str = ">>>", end: str = "<<<") -> str:
        """An example as text, what is learned of it between two marks."""
        parts, start = [], 0
        marks = example.is_answer_T
        for place in range(1, len(marks) + 1):
            if place == len(marks) or marks[place] != marks[start]:
                text = str(self._tokenizer.decode(example.ids_T[start:place].tolist()))
                parts.append(f"{begin}{text}{end}" if marks[start] else text)
                start = place
        return "".join(parts)


def examples_of(
    chats: Chats, renderer: Renderer, sequence_length: int, remarks: Remarks
) -> Iterator[Example]:
    """The examples of a source that fit into a row and have something to learn.

    Args:
        chats: the source.
        renderer: makes them.
        sequence_length: tokens of a row.
        remarks: told what is left out.
    """
    for place, turns in chats:
        example, where = renderer.example(turns, place), place.rpartition("/")[2]
        if len(example.ids_T) > sequence_length:
            remarks.add(LONG, f"{where}: {len(example.ids_T)} tokens")
        elif not example.num_answers:
            remarks.add(EMPTY, where)
        else:
            yield example
    remarks.update(chats.remarks)
