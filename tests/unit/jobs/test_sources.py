"""Text sources: every format, every way one can be bad, the split, and rows made of them."""

from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import json
import lzma
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conf.options.data import DataConfig
from jobs.corpus import builtin as _builtin
from jobs.corpus.builtin import stdlib_documents
from jobs.corpus.rows import load_rows
from jobs.corpus.sources import open_source
from jobs.corpus.survey import source_fingerprint
from sparsify.data.rows import TokenRows
from sparsify.data.split import is_held_out
from sparsify.errors import CalibrationError, InputError
from tests.conftest import REPOSITORY, equal, message

STORIES = [f"Story {i}: " + "the cat sat on the mat. " * (i % 7 + 1) for i in range(60)]
SEPARATOR = "<|endoftext|>"


def config(calibration="stdlib", **changes) -> DataConfig:
    return DataConfig(calibration=str(calibration), sequence_length=16, **changes)


def documents(name, held_out=None, seed=None, **changes) -> list[str]:
    return list(open_source(str(name), held_out, config(name, **changes), seed))


@pytest.fixture
def stories(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_text(f"\n{SEPARATOR}\n".join(STORIES) + "\n")
    return path


# --- formats ---------------------------------------------------------------------------------


def test_plain_text_is_split_at_separator_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\nmore\n<|endoftext|>\n\n  <|endoftext|>\ntwo <|endoftext|> two\n")
    assert documents(path) == ["one\nmore", "two <|endoftext|> two"]
    assert documents(path, separator="more") == [
        "one",
        "<|endoftext|>\n\n  <|endoftext|>\ntwo <|endoftext|> two",
    ]


def test_text_without_separators_is_one_document_unchanged(tmp_path):
    path = tmp_path / "a.py"
    path.write_bytes(b"\xef\xbb\xbf\tx = 1\r\n\ty = 2\r\n")
    assert documents(path) == ["\tx = 1\n\ty = 2\n"]


@pytest.mark.parametrize("opener", [gzip.open, bz2.open, lzma.open])
def test_compressed_text_and_jsonl(tmp_path, opener):
    suffix = {gzip.open: ".gz", bz2.open: ".bz2", lzma.open: ".xz"}[opener]
    with opener(tmp_path / f"a.txt{suffix}", "wt", encoding="utf-8") as file:
        file.write(f"one\n{SEPARATOR}\nté\n")
    with opener(tmp_path / f"b.jsonl{suffix}", "wt", encoding="utf-8") as file:
        file.write('{"text": "three"}\n')
    assert documents(tmp_path / f"a.txt{suffix}") == ["one", "té"]
    assert documents(tmp_path / f"b.jsonl{suffix}") == ["three"]


def write_records(path, field="text", texts=("one\u2028still one", "two, 2")):
    records = [{"id": i, field: text} for i, text in enumerate(texts)]
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in records) + "\n\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(records))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["id", field])
            writer.writeheader()
            writer.writerows(records)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path


RECORDS = [".jsonl", ".json", ".csv", ".parquet"]


@pytest.mark.parametrize("suffix", RECORDS)
def test_records(tmp_path, suffix):
    path = write_records(tmp_path / f"a{suffix}", field="body")
    assert documents(path, text_field="body") == ["one\u2028still one", "two, 2"]


@pytest.mark.parametrize("suffix", RECORDS)
def test_texts_that_look_like_something_else_stay_texts(tmp_path, suffix):
    """Readers of tables like to see dates, numbers and missing values in them."""
    for texts in (["2020-01-01", "2021-02-03"], ["007", "12"], ["NA", "null", "nan", "true"]):
        path = write_records(tmp_path / f"a{suffix}", texts=texts)
        assert documents(path) == texts


def test_data_sets_are_imported_when_one_is_read():
    """`datasets` takes seconds, and the commands import these modules at their start."""
    code = (
        "import sys, jobs.corpus.sources, jobs.corpus.file_parts;"
        "print([name for name in ('datasets', 'pyarrow') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("suffix", RECORDS)
def test_missing_field_lists_the_fields(tmp_path, suffix):
    path = write_records(tmp_path / f"a{suffix}", field="body")
    with pytest.raises(InputError) as error:
        documents(path)
    text = message(error)
    assert str(path) in text
    assert "no field 'text'; the fields are id, body; set data.text_field" in text


def test_folder_in_order_of_paths(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.md").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "c.jsonl").write_text('{"text": "third"}\n')
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / ".hidden.txt").write_text("hidden")
    assert documents(tmp_path) == ["first", "second", "third"]


def test_saved_dataset_folder(tmp_path):
    import datasets

    def dataset(*texts):
        return datasets.Dataset.from_dict({"text": texts, "n": list(range(len(texts)))})

    dataset("one", "two").save_to_disk(tmp_path / "plain")
    assert documents(tmp_path / "plain") == ["one", "two"]
    with pytest.raises(InputError, match="the fields are text, n"):
        documents(tmp_path / "plain", text_field="body")
    splits = datasets.DatasetDict({"train": dataset("one"), "test": dataset("two")})
    splits.save_to_disk(tmp_path / "splits")
    assert documents(tmp_path / "splits") == ["one"]
    assert documents(f"{tmp_path / 'splits'}@test") == ["two"]
    with pytest.raises(InputError, match="no split 'dev'; the splits are train, test"):
        documents(f"{tmp_path / 'splits'}@dev")
    with pytest.raises(InputError, match="without splits; leave out @test"):
        documents(f"{tmp_path / 'plain'}@test")


def test_hub_name_is_passed_on_in_parts(monkeypatch):
    import datasets

    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_dict({"text": ["one"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert documents("hf:org/name:small@test[:1%]") == ["one"]
    assert documents("hf:name") == ["one"]
    assert asked == [
        (("org/name", "small"), {"split": "test[:1%]"}),
        (("name", None), {"split": "train"}),
    ]


def test_hub_without_network_is_one_line():
    with pytest.raises(InputError) as error:
        documents("hf:no-such-org/no-such-dataset")
    text = message(error)
    assert "hf:no-such-org/no-such-dataset: no such file or folder, and as a data set" in text
    assert "cannot be loaded" in text


# --- bad input -------------------------------------------------------------------------------


def test_missing_file_names_close_matches(stories):
    with pytest.raises(InputError) as error:
        documents(stories.with_name("storys.txt"))
    assert f"close to it: {stories}" in message(error)
    with pytest.raises(InputError, match="close to it: stdlib"):
        documents("stdlb")
    with pytest.raises(InputError, match=r"nor the folder /nowhere.*stdlib, packages, code"):
        documents("/nowhere/x.txt")


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.txt", b"", ["no text in it"]),
        ("a.txt", b" \n\n", ["no text in it"]),
        ("a.jsonl", b"\n", ["no text in it"]),
        ("a.json", b"[]", ["no text in it"]),
        ("a.csv", b"", ["no text in it"]),
        ("a.txt", b"abc\xffdef", ["not UTF-8 at byte 3 (0xff)", "iconv"]),
        ("a.txt.gz", gzip.compress(b"ab\xe4", mtime=0), ["not UTF-8 at byte 2"]),
        ("a.txt.gz", gzip.compress(b"abc" * 99, mtime=0)[:-9], ["cannot be read"]),
        ("a.txt.gz", b"plain", ["cannot be read"]),
        ("a.txt.xz", b"plain", ["cannot be read"]),
        ("a.txt.bz2", b"plain", ["cannot be read"]),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', ["line 2", "not valid JSON"]),
        ("a.jsonl", b'["a"]\n', ["line 1", "a list, not an object"]),
        ("a.jsonl", b'{"text": null}\n', ["no text in it", "passed over: 1 (a.jsonl, line 1)"]),
        ("a.jsonl", b'{"text": 7}\n', ["line 1", "'text' is int, not a string"]),
        ("a.json", b'{\n"text": "a"}', ["line 1", "not valid JSON"]),
        ("a.json", b'"a"', ["expected a JSON list", "an object on each line"]),
        ("a.csv", b'text\n"a', ["not valid CSV"]),
        ("a.csv", b"id,text\n1\n", ["no text in it", "passed over: 1 (a.csv, line 2)"]),
        ("a.parquet", b"plain", ["not valid parquet"]),
        ("a.pdf", b"%PDF", ["format not known", ".jsonl"]),
        ("a.arrow", b"plain", ["not valid Arrow"]),
        ("a.zst", b"", ["format not known"]),
        ("a.txt.zst", b"plain", ["cannot be read"]),
        ("a.parquet.gz", b"", ["format not known"]),
    ],
)
def test_bad_file_is_refused_in_one_line(tmp_path, name, content, parts):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        documents(path)
    assert all(part in message(error) for part in [*parts, str(path)])


def test_unreadable_folder_and_file(tmp_path):
    with pytest.raises(InputError, match=r"a folder with no files; expected .txt"):
        documents(tmp_path)
    (tmp_path / "x.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"a folder with x.png; expected .txt"):
        documents(tmp_path)
    (tmp_path / "dataset_dict.json").write_text("{")
    with pytest.raises(InputError, match="not a usable dataset folder"):
        documents(tmp_path)


def test_file_without_permission(stories, monkeypatch):
    def refuse(path, mode):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)  # chmod would not stop the root user
    with pytest.raises(InputError, match=r"cannot be read .*Permission denied.*permissions"):
        documents(stories)


def test_long_csv_field(tmp_path):
    limit = csv.field_size_limit()
    (tmp_path / "a.csv").write_text("text\n" + "x" * 200_000 + "\n")
    assert len(documents(tmp_path / "a.csv")[0]) == 200_000
    assert csv.field_size_limit() == limit


# --- split and order -------------------------------------------------------------------------


def test_split_is_by_text_and_complete(stories):
    held = documents(stories, True, heldout_share=0.2)
    rest = documents(stories, False, heldout_share=0.2)
    assert held == [s.strip("\n") for s in STORIES if is_held_out(s, 0.2)]
    assert 0 < len(held) < len(rest)
    assert sorted(held + rest) == sorted(documents(stories))


def test_few_documents_are_split_at_their_ends(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("".join(f"{i:04} " for i in range(200)))
    rest, held = documents(path, False), documents(path, True)
    assert rest[0] + held[0] == path.read_text()
    assert len(held[0]) == 100


def test_order_depends_on_the_seed_alone(stories):
    first, again, other = (documents(stories, seed=s) for s in (1, 1, 2))
    assert first == again != other
    assert sorted(first) == sorted(other) == sorted(documents(stories))


def test_standard_library_is_split_by_file_name():
    train, held = set(documents("stdlib", False)), set(documents("stdlib", True))
    assert len(held) > 10
    assert len(train) > 10 * len(held)
    assert sum(map(len, train & held)) < 1000  # empty and boilerplate files only
    assert documents("stdlib", None) == documents("stdlib", False)
    assert documents("stdlib", False) == [t for t in stdlib_documents(False) if t]


def test_code_has_no_held_out_file_in_it(monkeypatch):
    """With stand-ins for the packages, which hold some 100 MB of text."""
    held = next(text for text in stdlib_documents(True) if len(text) > 100)
    monkeypatch.setattr(_builtin, "package_documents", lambda: iter(["one", held, "two"]))
    assert documents("code", False) == [*documents("stdlib", False), "one", "two"]
    assert documents("code", True) == documents("stdlib", True)


# --- rows ------------------------------------------------------------------------------------


def test_rows_are_reproducible_and_disjoint_from_held_out(stories, tiny_tokenizer):
    data = config(stories, heldout_share=0.2)
    first, warning = load_rows(data, "calibration", tiny_tokenizer, 40, seed=0)
    assert warning is None
    assert first.ids_NT.shape == (40, 16)
    assert first.ids_NT.dtype == first.positions_NT.dtype == torch.int64
    again, _ = load_rows(data, "calibration", tiny_tokenizer, 40, seed=0)
    other, _ = load_rows(data, "calibration", tiny_tokenizer, 40, seed=1)
    assert equal(first, again)
    assert not equal(first, other)
    train, _ = load_rows(data, "train", tiny_tokenizer, 40, seed=0)
    assert not equal(first, train)
    held, _ = load_rows(data, "heldout", tiny_tokenizer, 1, seed=0)
    assert equal(held, load_rows(data, "heldout", tiny_tokenizer, 1, seed=1)[0]), (
        "scores of runs with different seeds are of the same text"
    )
    text = tiny_tokenizer.decode(held.ids_NT[0])
    assert any(story.startswith(text) for story in STORIES if is_held_out(story, 0.2))


def test_only_what_is_needed_is_read(tiny_tokenizer, monkeypatch):
    read = []
    monkeypatch.setattr(_builtin, "_read", lambda path: read.append(path) or "x = 1\n" * 500)
    load_rows(config(), "calibration", tiny_tokenizer, 4, seed=0)
    assert 0 < len(read) <= 64  # one batch of the tokenizer


def test_calibration_that_is_too_short(tmp_path, tiny_tokenizer):
    path = tmp_path / "short.txt"
    path.write_text("the cat sat on the mat. " * 20)
    data = config(path)
    used = path.read_text()[: int(480 * 0.9)]  # one document: its last tenth is held out
    num_tokens = len(tiny_tokenizer(used)["input_ids"]) + 1
    whole = num_tokens // 16
    rows, warning = load_rows(data, "calibration", tiny_tokenizer, 4 * whole, seed=0)
    assert len(rows) == whole
    assert f"{whole} rows of 16 tokens, {4 * whole} were asked for" in warning
    with pytest.raises(CalibrationError) as error:
        load_rows(data, "calibration", tiny_tokenizer, 4 * whole + 1, seed=0)
    text = message(error)
    assert f"data.calibration={path}" in text
    assert any(f"{n} tokens;" in text for n in (num_tokens, num_tokens - 1))
    assert f"need {(4 * whole + 1) * 16}" in text
    assert "num_samples" in text


def test_not_one_row(tmp_path, tiny_tokenizer):
    path = tmp_path / "tiny.txt"
    path.write_text("cat")
    for which, kind in (
        ("calibration", CalibrationError), ("train", InputError), ("heldout", InputError),
    ):  # fmt: skip
        with pytest.raises(kind, match="tokens; 5 rows of 16 need 80") as error:
            load_rows(config(path), which, tiny_tokenizer, 5, seed=0)
        assert "distill" not in message(error), "any stage may have asked"


def test_short_held_out_part_is_used_whole_with_a_warning(stories, tiny_tokenizer):
    data = config(stories, heldout_share=0.2)
    rows, warning = load_rows(data, "heldout", tiny_tokenizer, 10_000, seed=0)
    assert 0 < len(rows) < 10_000
    assert "all of them are used" in warning


def test_training_repeats_in_a_new_order(stories, tiny_tokenizer):
    data = config(stories)
    short, _ = load_rows(data, "train", tiny_tokenizer, 10, seed=0)
    rows, warning = load_rows(data, "train", tiny_tokenizer, 1000, seed=0)
    assert rows.ids_NT.shape == (1000, 16)
    assert equal(rows[:10], short)
    num_once = int(warning.split("has ")[1].split(" rows")[0])
    assert f"used {1000 / num_once:.1f} times" in warning
    assert 200 < 2 * num_once < 1000
    first, second = rows.ids_NT[:num_once], rows.ids_NT[num_once : 2 * num_once]
    assert not torch.equal(first, second)
    # The same tokens but for the unfinished last row of each pass, at most 15 of them.
    counts = [torch.bincount(part.flatten(), minlength=320) for part in (first, second)]
    assert (counts[0] - counts[1]).abs().sum() <= 2 * 15


def test_explicit_held_out_source_is_used_whole(stories, tmp_path, tiny_tokenizer):
    path = tmp_path / "test.txt"
    path.write_text("a dog ran. " * 100)
    data = config(stories, heldout=str(path))
    rows, _ = load_rows(data, "heldout", tiny_tokenizer, 10**4, seed=0)
    num_tokens = len(tiny_tokenizer(path.read_text())["input_ids"]) + 1
    assert len(rows) == num_tokens // 16


def test_held_out_documents_never_reach_training(tmp_path, tiny_tokenizer):
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": "secret " * 50}) + "\n")
    lines = [{"text": "secret " * 50}] * 5 + [{"text": f"public {i} " * 9} for i in range(40)]
    (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = config(tmp_path / "all.jsonl", heldout=str(tmp_path / "test.jsonl"))
    for which in ("calibration", "train"):
        rows, _ = load_rows(data, which, tiny_tokenizer, 80, seed=0)
        assert "secret" not in tiny_tokenizer.decode(rows.ids_NT.flatten())
        assert "public" in tiny_tokenizer.decode(rows.ids_NT.flatten())


def test_held_out_must_not_be_the_training_source(stories, tiny_tokenizer):
    data = config(stories, heldout=str(stories.parent / "." / stories.name))
    for which in ("heldout", "calibration"):
        with pytest.raises(InputError, match=r"the same source as data.calibration"):
            load_rows(data, which, tiny_tokenizer, 2, seed=0)
    data = config("stdlib", train=str(stories), heldout=str(stories))
    with pytest.raises(InputError, match=r"the same source as data.train"):
        load_rows(data, "heldout", tiny_tokenizer, 2, seed=0)
    # Built-in sources have a split of their own.
    assert len(load_rows(config(heldout="stdlib"), "heldout", tiny_tokenizer, 2, seed=0)[0]) == 2


def test_rows_of_isolated_documents_have_the_same_tokens(stories, tiny_tokenizer):
    apart, _ = load_rows(config(stories), "calibration", tiny_tokenizer, 40, seed=0)
    data = config(stories, isolate_documents=False)
    together, _ = load_rows(data, "calibration", tiny_tokenizer, 40, seed=0)
    assert apart.is_joined
    assert torch.equal(apart.ids_NT, together.ids_NT)
    assert equal(together, TokenRows.whole(together.ids_NT))


# --- mixes -----------------------------------------------------------------------------------


@pytest.fixture
def letters(tmp_path):
    """Files whose rows tell their source: 30 documents of one letter each, a.txt and b.txt."""
    paths = []
    for letter in "ab":
        path = tmp_path / f"{letter}.txt"
        path.write_text(f"\n{SEPARATOR}\n".join(letter * (50 + i) for i in range(30)) + "\n")
        paths.append(path)
    return paths


def count_rows(rows, tokenizer, letters="ab"):
    """Rows per letter; no row may have text of two sources."""
    texts = [set(tokenizer.decode(row, skip_special_tokens=True)) for row in rows.ids_NT]
    assert all(len(text) == 1 for text in texts)
    return [texts.count({letter}) for letter in letters]


@pytest.mark.parametrize(
    ("weights", "num_rows", "expected"),
    [((0.5, 0.5), 20, [10, 10]), ((2, 1), 10, [7, 3]), ((1, 5), 10, [2, 8]), ((1, 1), 7, [4, 3])],
)
def test_mix_has_rows_in_proportion(letters, tiny_tokenizer, weights, num_rows, expected):
    mix = [f"{weight} {path}" for weight, path in zip(weights, letters, strict=True)]
    for which in ("calibration", "train"):
        rows, warning = load_rows(config(mix=mix), which, tiny_tokenizer, num_rows, seed=0)
        assert count_rows(rows, tiny_tokenizer) == expected
        assert warning is None


def test_mix_is_interleaved_and_depends_on_the_seed_alone(letters, tiny_tokenizer):
    data = config(mix=[f"0.5 {path}" for path in letters])
    first, again, other = (
        load_rows(data, "calibration", tiny_tokenizer, 40, seed)[0] for seed in (0, 0, 1)
    )
    assert equal(first, again)
    assert not equal(first, other)
    # Any stretch of 10 rows, and either of two workers, has something like its half.
    for part in [*first.split(10), first[::2], first[1::2]]:
        counts = count_rows(part, tiny_tokenizer)
        assert min(counts) >= 0.25 * len(part)


def test_mix_replaces_the_calibration_source_but_not_its_held_out_part(
    stories, letters, tiny_tokenizer
):
    data = config(stories, heldout_share=0.2, mix=[f"0.5 {path}" for path in letters])
    rows, _ = load_rows(data, "calibration", tiny_tokenizer, 20, seed=0)
    assert count_rows(rows, tiny_tokenizer) == [10, 10]
    held, _ = load_rows(data, "heldout", tiny_tokenizer, 4, seed=0)
    assert "Story" in tiny_tokenizer.decode(held.ids_NT.flatten())
    plain = config(stories, heldout_share=0.2)
    assert equal(held, load_rows(plain, "heldout", tiny_tokenizer, 4, seed=0)[0])
    train, _ = load_rows(replace(data, train=str(stories)), "train", tiny_tokenizer, 4, seed=0)
    assert "Story" in tiny_tokenizer.decode(train.ids_NT.flatten())


def test_mix_never_has_a_held_out_document(stories, letters, tmp_path, tiny_tokenizer):
    """The calibration source in the mix, and a file that has all of its documents and more."""
    held = {story.split(":")[0] for story in STORIES if is_held_out(story, 0.2)}
    copy = tmp_path / "copy.txt"
    copy.write_text(f"\n{SEPARATOR}\n".join([*STORIES, *("b" * i for i in range(1, 9))]) + "\n")
    for heldout in (None, str(letters[0])):
        data = config(stories, heldout_share=0.2, mix=[f"1 {stories}", f"1 {copy}"])
        data = replace(data, heldout=heldout, sequence_length=256)
        rows, _ = load_rows(data, "train", tiny_tokenizer, 100, seed=0)
        text = tiny_tokenizer.decode(rows.ids_NT.flatten())
        seen = set(re.findall(r"(Story \d+):", text))
        assert len(seen & held) == (0 if heldout is None else len(held))
        assert len(seen - held) == len(STORIES) - len(held)


def test_mix_that_cannot_be_made(letters, tiny_tokenizer):
    a, b = letters

    def error_of(kind, which, num_rows, mix, **changes):
        with pytest.raises(kind) as error:
            load_rows(config(mix=mix, **changes), which, tiny_tokenizer, num_rows, seed=0)
        return message(error)

    text = error_of(CalibrationError, "calibration", 500, [f"0.8 {a}", "0.2 stdlib"])
    assert f"data.mix={a}: the part not held out has" in text
    assert "400 rows of 16 need 6400, and at least 6400 are required" in text
    text = error_of(InputError, "calibration", 10, [f"0.01 {a}", f"0.99 {b}"])
    assert f"data.mix={a}: its share of 10 rows is 0.1 rows" in text
    assert "num_samples" in text
    text = error_of(InputError, "calibration", 10, ["0.5 stdlib", "0.5 stdlob"])
    assert "stdlob" in text
    assert "close to it: stdlib" in text
    text = error_of(InputError, "calibration", 10, [f"0.5 {a}", f"0.5 {b}"], heldout=str(b))
    assert "the same source as data.mix" in text


def test_mix_for_training_repeats_what_is_short(letters, tiny_tokenizer):
    a, b = letters
    data = config(mix=[f"1 {a}", f"1 {b}"])
    rows, warning = load_rows(data, "train", tiny_tokenizer, 1000, seed=0)
    assert count_rows(rows, tiny_tokenizer) == [500, 500]
    assert [f"data.mix={path}:" in warning for path in letters] == [True, True]
    assert warning.count("times") == 2


# --- fingerprints ----------------------------------------------------------------------------


def test_fingerprint_follows_the_content(stories, tmp_path):
    first = source_fingerprint(config(stories), "calibration")
    texts = [hashlib.sha256(story.encode()).digest() for story in STORIES]
    assert first == hashlib.sha256(b"".join(texts)).hexdigest()
    copy = tmp_path / "copy.txt"
    copy.write_bytes(stories.read_bytes())
    assert source_fingerprint(config(copy), "calibration") == first
    lines = [{"text": text} for text in (None, *STORIES[:9], "", *STORIES[9:])]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, lines)))
    assert source_fingerprint(config(rows), "calibration") == first, "the same text"
    copy.write_bytes(stories.read_bytes() + b"!")
    assert source_fingerprint(config(copy), "calibration") != first
    data = config(copy, heldout=str(stories))
    assert source_fingerprint(data, "heldout") == first
    assert source_fingerprint(data, "train") == source_fingerprint(data, "calibration")


def test_fingerprint_of_a_folder(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.txt").write_text("one")
    prints = [source_fingerprint(config(folder), "calibration")]
    (folder / "b.txt").write_text("two")
    prints.append(source_fingerprint(config(folder), "calibration"))
    (folder / "b.txt").rename(folder / "c.txt")
    assert source_fingerprint(config(folder), "calibration") == prints[1], "the same text"
    (folder / "c.txt").rename(folder / "0.txt")
    prints.append(source_fingerprint(config(folder), "calibration"))
    (folder / "0.txt").write_text("tow")
    prints.append(source_fingerprint(config(folder), "calibration"))
    assert len(set(prints)) == 4
    (folder / "0.txt").write_text("two")
    assert source_fingerprint(config(folder), "calibration") == prints[2]


def test_fingerprint_of_the_standard_library():
    train = source_fingerprint(config(), "train")
    assert train == source_fingerprint(replace(config(), separator="#"), "calibration")
    assert train != source_fingerprint(config(), "heldout")


def test_fingerprint_of_a_mix_covers_its_sources_and_what_is_held_out(stories, letters, tmp_path):
    a, b = letters
    data = config(stories, mix=[f"1 {a}", f"1 {b}"])
    prints = [source_fingerprint(data, "calibration")]
    assert source_fingerprint(data, "train") == prints[0]
    assert source_fingerprint(replace(data, train=str(a)), "train") == source_fingerprint(
        config(a), "calibration"
    )
    assert source_fingerprint(data, "heldout") == source_fingerprint(config(stories), "heldout")
    prints.append(source_fingerprint(replace(data, mix=[f"1 {a}"]), "calibration"))
    for path in (a, b, stories):
        path.write_text(path.read_text() + "x")
        prints.append(source_fingerprint(data, "calibration"))
    assert len(set(prints)) == 5


def test_fingerprint_of_a_missing_file(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        source_fingerprint(config(tmp_path / "x.txt"), "train")
