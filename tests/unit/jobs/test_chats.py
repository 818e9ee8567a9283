"""Records of conversations: their forms, the templates, what is learned of them, and bad ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.corpus.chats import NO_ANSWER, TEXT, Chats, check_fields
from jobs.corpus.documents import Remarks
from jobs.corpus.templates import EMPTY, LONG, Renderer, examples_of, template_of
from sparsify.errors import InputError
from tests.conftest import END_OF_TEXT, message

TURNS = [{"role": "user", "content": "def f"}, {"role": "assistant", "content": "return x"}]

FORMS: dict[str, dict[str, Any]] = {
    "messages": {"messages": TURNS, "source": "x"},
    "ShareGPT": {
        "conversations": [
            {"from": "human", "value": "def f"}, {"from": "gpt", "value": "return x"},
        ]
    },
    "prompt/completion": {"prompt": "def f", "completion": "return x"},
    "Alpaca": {"instruction": "def f", "input": "", "output": "return x"},
    "Dolly": {"instruction": "def f", "context": "", "response": "return x", "category": "x"},
    "question/answer": {"question": "def f", "answer": "return x"},
    "document/summary": {"document": "def f", "summary": "return x"},
    "dialogue": {"history": ["def f"], "response": "return x"},
}  # fmt: skip

HEADED = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)

MARKED = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)


def written(path: Path, records: list[Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("form", FORMS)
def test_forms_are_recognised_and_give_the_same_turns(form: str, tmp_path: Path) -> None:
    chats = Chats(written(tmp_path / "a.jsonl", [FORMS[form]] * 3))
    assert chats.form() == form
    assert [turns for _, turns in chats] == [TURNS] * 3
    digest, count = chats.digest()
    assert count == 3
    listed = tmp_path / "b.json"
    listed.write_text(json.dumps([FORMS["messages"]] * 3))
    assert Chats(str(listed)).digest() == (digest, count), "the form of the file decides nothing"


def test_texts_in_turns_are_the_users_and_the_assistants(tmp_path: Path) -> None:
    """LIMA's conversations have no roles; FaithDial's history ends with the user."""
    lima = {"conversations": ["a", "b", "c", "d"], "source": "x"}
    faith = {"history": ["b", "c"], "response": "d", "knowledge": "k"}
    said = [
        list(Chats(written(tmp_path / f"{i}.jsonl", [one]))) for i, one in enumerate([lima, faith])
    ]
    assert [[(t["role"], t["content"]) for t in one[0][1]] for one in said] == [
        [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")],
        [("system", "k"), ("assistant", "b"), ("user", "c"), ("assistant", "d")],
    ]


def test_parquet_and_a_saved_dataset_are_read_as_lines_are(tmp_path: Path) -> None:
    import datasets

    records = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(5)]
    fields = ["prompt:question", "completion:answer"]
    expected = Chats(written(tmp_path / "a.jsonl", records), fields).digest()
    made = datasets.Dataset.from_list(records)
    made.to_parquet(tmp_path / "a.parquet")
    made.save_to_disk(tmp_path / "saved")
    for name in ("a.parquet", "saved"):
        chats = Chats(str(tmp_path / name), fields)
        assert chats.form() == "prompt/completion"
        assert chats.digest() == expected


def test_text_is_no_form_of_conversations(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a story")
    assert Chats(str(tmp_path / "a.txt")).form() == TEXT
    assert Chats("stdlib").form() == TEXT
    assert Chats(written(tmp_path / "b.jsonl", [{"text": "a story"}])).form() == TEXT


@pytest.mark.parametrize(
    ("records", "fields", "said"),
    [
        ([{"query": "a", "reply": "b"}], [], "line 1: the fields query, reply are of no known"),
        ([{"q": "a"}], ["prompt:question"], "no field 'question', which finetune.fields names"),
        ([FORMS["Alpaca"], FORMS["messages"]], [], "line 2: has the fields of messages, and the"),
        ([FORMS["messages"], {"text": "b"}], [], "line 2: is a document of text, and the records"),
        ([{"messages": [{"role": "user"}]}], [], "turn 1 of messages has the fields role;"),
        ([{"messages": "hello"}], [], "messages is not a list of turns"),
        ([{"conversations": [{"from": "cat", "value": "b"}]}], [], "turn 1 is from 'cat'"),
        ([{"prompt": "a", "completion": 3}], [], "completion is int, not a string"),
        ([{"messages": TURNS[:1]}], [], "not one record with an answer in it"),
        ([["a"]], [], "a list, not an object with fields"),
    ],
)  # fmt: skip
def test_bad_records_are_refused_in_one_line(
    records: list[Any], fields: list[str], said: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as error:
        Chats(written(tmp_path / "a.jsonl", records), fields).digest()
    assert said in message(error)
    assert "a.jsonl" in message(error)


def test_records_without_an_answer_are_counted(tmp_path: Path) -> None:
    chats = Chats(written(tmp_path / "a.jsonl", [FORMS["messages"], {"messages": TURNS[:1]}]))
    assert chats.digest()[1] == 1
    assert chats.remarks.lines() == [f"{NO_ANSWER}: 1 (a.jsonl, line 2)"]


def test_names_of_fields_are_those_of_forms() -> None:
    with pytest.raises(InputError) as error:
        check_fields(["question:prompt"])
    assert "'question:prompt' is not NAME:COLUMN" in message(error)


LONGER = [*TURNS, {"role": "user", "content": "and g"}, {"role": "assistant", "content": "y"}]


@pytest.mark.parametrize("template", [HEADED, MARKED], ids=["by prefix", "marked"])
def test_answers_alone_are_learned_with_their_end(tiny_tokenizer, template: str) -> None:
    renderer = Renderer(tiny_tokenizer, template)
    example = renderer.example(LONGER, "here")
    end = END_OF_TEXT
    assert renderer.shown(example, "[", "]") == (
        f"<user>def f<assistant>[return x{end}]<user>and g<assistant>[y{end}]"
    )


def test_templates_that_are_built_in(tiny_tokenizer) -> None:
    raw = Renderer(tiny_tokenizer, template_of(tiny_tokenizer, "raw"))
    assert raw.shown(raw.example(TURNS, ""), "[", "]") == f"def f[return x{END_OF_TEXT}]"
    alpaca = Renderer(tiny_tokenizer, template_of(tiny_tokenizer, "alpaca"))
    assert alpaca.shown(alpaca.example(TURNS, ""), "[", "]") == (
        f"### Instruction:\ndef f\n\n### Response:\n[return x{END_OF_TEXT}]"
    )
    system = [{"role": "system", "content": "Be brief."}, *LONGER]
    assert "Be brief.\n\n###" in alpaca.shown(alpaca.example(system, ""))


@pytest.mark.parametrize(
    ("template", "turns", "said"),
    [
        (
            "{% for m in messages %}{% if m['role'] == 'system' %}"
            "{{ raise_exception('System role not supported') }}{% endif %}{{ m['content'] }}"
            "{% endfor %}",
            [{"role": "system", "content": "s"}, *TURNS],
            "the chat template cannot render it (System role not supported)",
        ),
        (
            "{% for m in messages %}{% if m['role'] != 'tool' %}{{ m['content'] }}{% endif %}"
            "{% endfor %}",
            [{"role": "tool", "content": "seven"}, *TURNS],
            "the chat template leaves out the turn of role 'tool'",
        ),
        (
            "{% for m in messages %}{{ m['content'] }}{% if loop.last %}!{% endif %}{% endfor %}",
            LONGER,
            "rendered up to turn 2 the conversation does not begin as it does in full",
        ),
        ("{% for m in", TURNS, "the chat template cannot render it"),
    ],
)
def test_templates_that_cannot_be_trained_with(
    tiny_tokenizer, template: str, turns: list[Any], said: str
) -> None:
    with pytest.raises(InputError) as error:
        Renderer(tiny_tokenizer, template).example(turns, "a.jsonl, line 3")
    assert said in message(error)
    assert "a.jsonl, line 3" in message(error)


def test_no_template_is_refused_and_a_file_is_read(tiny_tokenizer, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        template_of(tiny_tokenizer, None)
    assert "has no chat template; give one with finetune.template=" in message(error)
    with pytest.raises(InputError) as error:
        template_of(tiny_tokenizer, str(tmp_path / "none.jinja"))
    assert "cannot be read" in message(error)
    (tmp_path / "own.jinja").write_text(HEADED)
    assert template_of(tiny_tokenizer, str(tmp_path / "own.jinja")) == HEADED


def test_long_records_and_empty_answers_are_left_out_and_counted(
    tiny_tokenizer, tmp_path: Path
) -> None:
    records = [
        FORMS["prompt/completion"],
        {"prompt": "a " * 60, "completion": "b"},
        {"prompt": "a", "completion": " "},
    ]
    no_end = "{% for m in messages %}{{ m['content'] | trim }}{% endfor %}"
    chats, remarks = Chats(written(tmp_path / "a.jsonl", records)), Remarks()
    found = list(examples_of(chats, Renderer(tiny_tokenizer, no_end), 32, remarks))
    assert len(found) == 1
    lines = remarks.lines()
    assert any(line.startswith(f"{LONG}: 1 (a.jsonl, line 2:") for line in lines)
    assert f"{EMPTY}: 1 (a.jsonl, line 3)" in lines
