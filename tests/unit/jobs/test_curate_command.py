"""Curation as a whole: what comes out, going on after a stop, and what is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from conf.options.curate import CurateConfig, CurateJobConfig
from jobs.corpus.chats import Chats
from jobs.corpus.text_files import read_source
from jobs.reporting.curation import report
from jobs.workers.curate import DATA, RECORD, STATE, write_corpus
from sparsify.errors import InputError
from tests.conftest import message
from tests.unit.jobs.test_tokenize_command import Context, Told, in_process

WORDS = [f"word{i}" for i in range(300)]


def story(seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=60))


def changed(text: str) -> str:
    return text.replace(text.split()[30], "other", 1)


STORIES = [story(seed) for seed in range(60)]
TEXTS = [*STORIES, STORIES[3].upper(), changed(STORIES[5]), "", story(99)]


def write_lines(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "in.jsonl", [{"text": t, "id": i} for i, t in enumerate(TEXTS)])


def curate(out: Path, map_shards=in_process, **options) -> list[str]:
    out.mkdir(exist_ok=True)
    told = Told()
    options = {"shard_bytes": 4000, **options}
    options["sources"] = [str(source) for source in options["sources"]]
    write_corpus(CurateJobConfig(curate=CurateConfig(**options)), out, map_shards, told)  # type: ignore[arg-type]
    return told.lines


def kept(out: Path) -> list[dict]:
    paths = sorted((out / DATA).iterdir())
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_copies_go_and_records_stay_as_they_were(corpus: Path, tmp_path: Path) -> None:
    curate(tmp_path / "out", sources=[corpus])
    found = kept(tmp_path / "out")
    assert [record["id"] for record in found] == [*range(60), 63]
    assert all(record["text"] == TEXTS[record["id"]] for record in found)
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    (source,) = record["sources"]
    assert source["dropped"] == {"copies.exact": 1, "copies.near": 1, "empty": 1}
    near = next(pair for pair in record["pairs"] if pair["reason"] == "copies.near")
    assert near["kept"]["text"] == STORIES[5]
    assert near["dropped"] == {"place": near["dropped"]["place"], "text": TEXTS[61]}
    assert 0.8 <= near["similarity"] < 1
    assert len(record["files"]) > 3
    # what else reads text reads the folder
    texts = list(read_source(str(tmp_path / "out" / DATA), "text", "<|endoftext|>", ()))
    assert texts == [record["text"] for record in found]


def test_the_page_and_the_tables(corpus: Path, tmp_path: Path, capsys) -> None:
    with corpus.open("a") as file:
        file.write(json.dumps({"text": "too <short>"}) + "\n")
    curate(tmp_path / "out", sources=[corpus], min_words=5)
    report(tmp_path / "out", "python -m jobs.curate curate.min_words=5")
    table = capsys.readouterr().out
    page = (tmp_path / "out" / "report.html").read_text()
    for words in ("in.jsonl", "length.min_words", "copies.near"):
        assert words in table
        assert words in page
    for words in ("61 of 65 documents", "too &lt;short&gt;", "2, less than 5", TEXTS[61][:200]):
        assert words in page
    assert "<script" not in page


@pytest.mark.parametrize("num_shards", [1, 4])
def test_bytes_do_not_depend_on_who_did_what_when(corpus, tmp_path: Path, num_shards: int) -> None:
    curate(tmp_path / "one", sources=[corpus])

    def backwards(work, payloads):
        in_process(work, list(reversed(payloads)))

    curate(tmp_path / "two", backwards, sources=[corpus])
    assert contents(tmp_path / "one") == contents(tmp_path / "two")

    class Stop(Exception):
        pass

    calls = 0

    def stopping(work, payloads):
        nonlocal calls
        for payload in payloads:
            if calls == num_shards:
                raise Stop
            calls += 1
            work(Context(), payload)

    while True:  # killed again and again, a few shards further each time
        calls = 0
        try:
            curate(tmp_path / "three", stopping, sources=[corpus])
            break
        except Stop:
            assert (tmp_path / "three" / STATE).is_dir()
            assert not (tmp_path / "three" / RECORD).exists()
    assert contents(tmp_path / "one") == contents(tmp_path / "three")


def test_a_finished_folder_is_left_alone_and_a_damaged_file_made_again(corpus, tmp_path) -> None:
    out = tmp_path / "out"
    curate(out, sources=[corpus])
    before = contents(out)

    def refuse(work, payloads):
        raise AssertionError

    assert "whole already, nothing to do" in curate(out, refuse, sources=[corpus])
    damaged = sorted((out / DATA).iterdir())[1]
    damaged.write_bytes(b"x")
    curate(out, sources=[corpus])
    assert contents(out) == before


def test_an_unfinished_corpus_may_be_mixed_in_another_way(corpus, tmp_path: Path) -> None:
    def only_judging(work, payloads):
        if work.__name__ != "judge_shard":
            raise KeyboardInterrupt
        in_process(work, payloads)

    def no_judging(work, payloads):
        assert work.__name__ != "judge_shard"
        in_process(work, payloads)

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        curate(out, only_judging, sources=[corpus])
    curate(out, no_judging, sources=[f"0.5 {corpus}"])
    assert len(kept(out)) == 30
    curate(tmp_path / "fresh", sources=[f"0.5 {corpus}"])
    assert contents(out) == contents(tmp_path / "fresh")


def test_formats_give_the_same_documents(corpus, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": TEXTS, "id": list(range(len(TEXTS)))})
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet", row_group_size=25)
    (tmp_path / "in.txt").write_text("\n<|endoftext|>\n".join(TEXTS))
    curate(tmp_path / "a", sources=[corpus], format="parquet")
    curate(tmp_path / "b", sources=[tmp_path / "in.parquet"], format="parquet")
    curate(tmp_path / "c", sources=[tmp_path / "in.parquet"])
    curate(tmp_path / "d", sources=[tmp_path / "in.txt"])

    def rows(out: Path) -> list[dict]:
        paths = sorted((out / DATA).iterdir())
        return [row for p in paths for row in pyarrow.parquet.read_table(p).to_pylist()]

    expected = [{"text": TEXTS[i], "id": i} for i in (*range(60), 63)]
    assert rows(tmp_path / "a") == rows(tmp_path / "b") == kept(tmp_path / "c") == expected
    assert pyarrow.parquet.read_schema(next((tmp_path / "b" / DATA).iterdir())) == table.schema
    assert [r["text"] for r in kept(tmp_path / "d")] == [r["text"] for r in expected]


def test_chats_pass_whole(tmp_path: Path) -> None:
    chats = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "ok"}],
         "meta": {"n": [i, None]}}
        for i, text in enumerate(STORIES[:8] + STORIES[:2])
    ]  # fmt: skip
    curate(tmp_path / "out", sources=[write_lines(tmp_path / "chat.jsonl", chats)])
    assert kept(tmp_path / "out") == chats[:8]


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_conversations_of_several_forms_become_one(tmp_path: Path, format: str) -> None:
    asked = {"role": "user", "content": "why"}
    alpaca = [{"instruction": "why", "input": "", "output": story(i), "id": i} for i in range(8)]
    dolly = [{"instruction": "why", "context": "", "response": story(i + 20)} for i in range(8)]
    silent = {"conversations": [{"from": "human", "value": "why"}]}
    files = {"a.jsonl": [*alpaca, silent], "b.jsonl": dolly}
    sources = [write_lines(tmp_path / name, records) for name, records in files.items()]
    curate(tmp_path / "out", sources=sources, as_messages=True, format=format)
    chats = Chats(str(tmp_path / "out" / DATA))
    assert chats.form() == "messages"
    answers = [story(i) for i in [*range(8), *range(20, 28)]]
    assert [turns for _, turns in chats] == [
        [asked, {"role": "assistant", "content": answer}] for answer in answers
    ]
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert record["sources"][0]["dropped"] == {"no answer": 1}


def test_text_is_no_conversation_and_is_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        curate(tmp_path / "out", sources=[corpus], as_messages=True)
    assert (
        "line 1: curate.as_messages=true wants conversations, and the fields text, id"
        in message(error)
    )


def test_several_sources_in_proportion(corpus, tmp_path: Path) -> None:
    second = write_lines(tmp_path / "b.jsonl", [{"text": story(s)} for s in range(200, 220)])
    sources = [f"0.5 {corpus}", f"0.5 {second}"]
    curate(tmp_path / "out", sources=sources, mixing="proportions")
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert [one["documents_taken"] for one in record["sources"]] == [20, 20]
    curate(tmp_path / "again", sources=sources, mixing="proportions", when_short="repeat")
    texts = [one["text"] for one in kept(tmp_path / "again")]
    assert len(texts) == 122
    assert sum(text == story(200) for text in texts) in (3, 4)
    assert len(texts[:81]) == len(set(texts[:81]))  # no document again before all have come


def test_evaluation_texts_are_kept_out(corpus, tmp_path: Path) -> None:
    test = write_lines(tmp_path / "test.jsonl", [{"question": STORIES[7][:200], "answer": "7"}])
    lines = curate(tmp_path / "out", sources=[corpus], against=[str(test)])
    assert [r["id"] for r in kept(tmp_path / "out")] == [*range(7), *range(8, 60), 63]
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert record["sources"][0]["dropped"]["overlap.test.jsonl"] == 1
    assert record["warnings"] == ["curate.against: 1 texts are too short to be looked for"]
    assert lines


REFUSED = [
    ({"sources": []}, "curate.sources: is empty"),
    ({"sources": ["nothing.jsonl"]}, "there is no such file or folder"),
    ({"fields": ["txt"]}, "line 1: no field 'txt'; the fields are text, id"),
    ({"min_words": 1000}, "nothing is left of 64 documents; 63 were dropped by length.min_words"),
    ({"languages": ["xx"]}, "no language 'xx'"),
    ({"against": ["nothing.jsonl"]}, "there is no such file or folder"),
    ({"quality": ["c5"]}, "no rules 'c5'; there are: c4, fineweb"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED)
def test_refused_in_one_line(corpus, tmp_path: Path, options, words: str) -> None:
    with pytest.raises(InputError) as error:
        curate(tmp_path / "out", **{"sources": [corpus], **options})
    assert words in message(error)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sources": ["0.7 a", "0.4 b"], "mixing": "proportions"}, "the shares sum to 1.1"),
        ({"sources": ["a", "b"], "mixing": "proportions"}, "the shares are missing"),
        ({"sources": ["1 a", "b"]}, "some sources have a share and some have none"),
        ({"sources": ["2 a"]}, "the share 2 is not over 0 and at most 1"),
        ({"sources": ["a", "a"]}, "names a twice"),
        ({"min_words": 9, "max_words": 3}, "is more than curate.max_words=3"),
        ({"total": 5}, "curate.mixing=proportions alone"),
        ({"when_short": "error"}, "needs curate.total"),
        ({"near": 1.5}, "curate.near=1.5: must be"),
    ],
)
def test_options_that_do_not_fit(options, words: str) -> None:
    with pytest.raises(InputError) as error:
        CurateConfig(**options)
    assert words in message(error)


def test_a_folder_of_something_else(corpus, tmp_path: Path) -> None:
    out = tmp_path / "out"
    curate(out, sources=[corpus])
    with pytest.raises(InputError) as error:
        curate(out, sources=[corpus], near=0.5)
    assert "made from something else (judging.near: 0.8 -> 0.5)" in message(error)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(InputError) as error:
        curate(tmp_path / "mine", sources=[corpus])
    assert "holds other files and no corpus" in message(error)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": 7}', "field 'text' is int"),
        ("[1]", "a list, not an object"),
        ('{"text": ', "not valid JSON"),
        ('{"body": "x"}', "no field that is known to hold text"),
    ],
)
def test_bad_records_name_their_line(corpus, tmp_path: Path, line: str, words: str) -> None:
    with corpus.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(InputError) as error:
        curate(tmp_path / "out", sources=[corpus])
    assert f"{corpus}, line " in message(error)
    assert words in message(error)
