"""Conversations of one record: which form its fields are, and the turns in it.

The forms are those that data sets of instructions have. Whatever the form, a record becomes a list
of turns, each with a role and a content, the answers those of the assistant.
"""

from __future__ import annotations

from typing import Any

from sparsify.errors import InputError

Turn = dict[str, str]

_SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "chatgpt": "assistant", "model": "assistant", "system": "system", "tool": "tool",
}  # fmt: skip


def form_of(record: dict[str, Any]) -> str | None:
    """The form whose fields a record has; None for none."""
    for form, (needed, _) in _FORMS.items():
        if all(name in record for name in needed):
            return form
    return None


def forms_said() -> str:
    """The fields of every form, for a message."""
    return "; ".join(" and ".join(needed) for needed, _ in _FORMS.values())


def turns_of(record: dict[str, Any], form: str, place: str) -> list[Turn]:
    """The turns of a record.

    Args:
        record: with the fields of the form.
        form: as `form_of` says.
        place: for messages.

    Raises:
        InputError: the fields do not hold what the form says.
    """
    turns: list[Turn] = _FORMS[form][1](record, place)
    return turns


def conversation_of(record: dict[str, Any], place: str, option: str) -> list[Turn]:
    """The turns of a record of any form.

    Raises:
        InputError: it is of no form, which says the `option` that wants one, or as `turns_of`.
    """
    form = form_of(record)
    if form is None:
        raise InputError(
            f"{place}: {option} wants conversations, and the fields {', '.join(record) or '(none)'}"
            f" are of no known form; expected {forms_said()}; or leave it out"
        )
    return turns_of(record, form, place)


def has_answer(turns: list[Turn]) -> bool:
    """Whether the assistant says something."""
    return any(turn["role"] == "assistant" and turn["content"] for turn in turns)


def _content(value: Any, what: str, place: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"{place}: {what} is {type(value).__name__}, not a string")
    return value


def _list_of(value: Any, what: str, place: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise InputError(f"{place}: {what} is not a list of turns, each with its role and content")
    return value


def _of_messages(record: dict[str, Any], place: str, name: str = "messages") -> list[Turn]:
    turns = []
    for number, turn in enumerate(_list_of(record[name], name, place), 1):
        role = turn.get("role")
        if not isinstance(role, str) or "content" not in turn:
            raise InputError(
                f"{place}: turn {number} of {name} has the fields {', '.join(turn)}; expected role "
                "and content"
            )
        turns.append({"role": role, "content": _content(turn["content"], "content", place)})
    return turns


def _of_sharegpt(record: dict[str, Any], place: str) -> list[Turn]:
    said = record["conversations"]
    if isinstance(said, list) and said and all(isinstance(text, str) for text in said):  # LIMA
        return [_turn(number % 2 == 1, text) for number, text in enumerate(said)]
    turns = []
    for number, turn in enumerate(_list_of(said, "conversations", place), 1):
        if "from" not in turn or "value" not in turn:
            raise InputError(
                f"{place}: turn {number} of conversations has the fields {', '.join(turn)}; "
                "expected from and value"
            )
        role = _SHAREGPT_ROLES.get(str(turn["from"]).lower())
        if role is None:
            raise InputError(
                f"{place}: turn {number} is from {turn['from']!r}; expected one of "
                f"{', '.join(_SHAREGPT_ROLES)}"
            )
        turns.append({"role": role, "content": _content(turn["value"], "value", place)})
    return turns


def _of_pair(record: dict[str, Any], place: str) -> list[Turn]:
    found = []
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        if isinstance(record[name], list):
            found += _of_messages(record, place, name)
        else:
            found.append({"role": role, "content": _content(record[name], name, place)})
    return found


def _task(name: str, given: str | None, answer: str) -> Any:
    """A form of two turns: a task, with what it is about below it, and its answer."""

    def turns(record: dict[str, Any], place: str) -> list[Turn]:
        asked = [_content(record[name], name, place)]
        if given is not None:
            asked.append(_content(record.get(given), given, place))
        task = "\n\n".join(text for text in asked if text)
        return [_turn(False, task), _turn(True, _content(record[answer], answer, place))]

    return turns


def _of_dialogue(record: dict[str, Any], place: str) -> list[Turn]:
    """What was said, a text each, then what is answered to the last; before it what is known."""
    said = record["history"]
    if not isinstance(said, list) or not all(isinstance(text, str) for text in said):
        raise InputError(f"{place}: history is not a list of texts")
    first = len(said) % 2  # the last of them is the user's
    turns = [_turn((number + first) % 2 == 0, text) for number, text in enumerate(said)]
    knowledge = _content(record.get("knowledge"), "knowledge", place)
    before = [{"role": "system", "content": knowledge}] if knowledge else []
    answer = _content(record["response"], "response", place)
    return [*before, *turns, _turn(True, answer)]


def _turn(is_answer: bool, content: str) -> Turn:
    return {"role": "assistant" if is_answer else "user", "content": content}


_FORMS: dict[str, tuple[tuple[str, ...], Any]] = {
    "messages": (("messages",), _of_messages),
    "ShareGPT": (("conversations",), _of_sharegpt),
    "prompt/completion": (("prompt", "completion"), _of_pair),
    "Alpaca": (("instruction", "output"), _task("instruction", "input", "output")),
    "Dolly": (("instruction", "response"), _task("instruction", "context", "response")),
    "question/answer": (("question", "answer"), _task("question", None, "answer")),
    "document/summary": (("document", "summary"), _task("document", None, "summary")),
    "dialogue": (("history", "response"), _of_dialogue),
}
"""form -> the fields that a record of it has, and how its turns are read; the first that fits"""
