"""Filters: every rule drops what it is there for, and its limits can be moved."""

from __future__ import annotations

import pytest

from conf.options.curate import CurateConfig
from jobs.curation.filters import filter_names, find_filter, make_judges
from jobs.curation.overlap import collect
from jobs.curation.text import Text
from sparsify.errors import InputError
from tests.conftest import message

GOOD = (
    "The old house stood at the end of the lane, and nobody had lived in it for years.\n"
    "Children said that it was full of ghosts, but the baker knew that only owls lived there.\n"
    "One evening in May she took a lamp with her and went to have a look at the kitchen.\n"
    "It was dusty. A chair had been moved to the window, and on it lay a letter to the mayor.\n"
    "She read it twice. Then she put it back, blew out the lamp, and never spoke of it again."
)
LONG = " ".join(f"{word}{i}" for i, word in enumerate(["apple", "stone", "river"] * 40))


def drop(text: str, config: CurateConfig, against=None) -> str | None:
    """The rule that drops a text, with its filter."""
    for name, judge in make_judges(config, against):
        if (found := judge(Text(text))) is not None:
            return f"{name}.{found.rule}"
    return None


QUALITY = ["c4", "fineweb", "gopher_quality", "gopher_repetition"]


def test_every_file_is_a_filter_with_a_summary() -> None:
    assert {*QUALITY, "length", "language", "overlap"} == set(filter_names())
    for name in filter_names():
        assert find_filter(name).summary


@pytest.mark.parametrize("name", QUALITY)
def test_prose_passes(name: str) -> None:
    assert drop(GOOD, CurateConfig(quality=[name])) is None


def one_line(text: str) -> str:
    return " ".join(text.split())


CASES = [
    ("gopher_quality.min_words", "Too short to be of any use to the reader."),
    ("gopher_quality.min_mean_word_chars", "a b the of c d " * 20),
    ("gopher_quality.max_mean_word_chars",
     "the extraordinarily incomprehensible misunderstandings of " * 20),
    ("gopher_quality.max_hashes_per_word", GOOD + " #tag" * 40),
    ("gopher_quality.max_ellipses_per_word", GOOD + " and so ..." * 30),
    ("gopher_quality.max_bullet_lines", "\n".join(f"- {line}" for line in GOOD.split("\n"))),
    ("gopher_quality.max_ellipsis_lines", GOOD.replace(".\n", " ...\n").replace(". ", ", ")),
    ("gopher_quality.min_words_with_letter", GOOD + " 1234" * 60),
    ("gopher_quality.min_stop_words", LONG),
    ("gopher_repetition.max_duplicate_paragraphs", "\n\n".join([LONG, "one more", "one more"])),
    ("gopher_repetition.max_duplicate_paragraph_chars",
     "\n\n".join(["a", "b", "c", GOOD, GOOD])),
    ("gopher_repetition.max_duplicate_lines", "\n".join([LONG, "x", "x", "x"])),
    ("gopher_repetition.max_duplicate_line_chars", "\n".join("abcdef") + f"\n{LONG}\n{LONG}"),
    ("gopher_repetition.max_top_2gram_chars", LONG + " green tea" * 40),
    ("gopher_repetition.max_top_3gram_chars",
     " ".join(f"good old tea unique{i}one two{i}more three{i}else" for i in range(30))),
    ("gopher_repetition.max_duplicate_5gram_chars",
     f"{one_line(GOOD)} {LONG} {one_line(GOOD)}"),
    ("c4.max_curly_brackets", GOOD + " {x}"),
    ("c4.max_lorem_ipsum", GOOD + " Lorem  ipsum. Lorem ipsum."),
    ("c4.min_sentences", "One sentence is here.\nno end\nAccept our cookie policy, it is fine."),
    ("fineweb.min_lines_with_end", "\n".join(f"A line without its end, {i}" for i in range(9))),
    ("fineweb.max_short_lines", "\n".join(f"Short {i}." for i in range(9))),
    ("fineweb.max_duplicate_line_chars", f"{GOOD}\n{GOOD}"),
    ("fineweb.max_lines_per_word", GOOD + "\n" * 60),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "text"), CASES, ids=[rule for rule, _ in CASES])
def test_each_rule_drops_and_can_be_switched_off(rule: str, text: str) -> None:
    name = rule.partition(".")[0]
    assert drop(text, CurateConfig(quality=[name])) == rule
    assert drop(text, CurateConfig(quality=[name], limits=[f"{rule} off"])) != rule


def test_every_rule_has_a_case() -> None:
    rules = {f"{name}.{rule}" for name in QUALITY for rule in find_filter(name).limits}
    rest = rules - {rule for rule, _ in CASES}
    assert rest == {
        "gopher_quality.max_words", "gopher_repetition.max_top_4gram_chars",
        *(f"gopher_repetition.max_duplicate_{n}gram_chars" for n in range(6, 11)),
    }  # fmt: skip


def test_gopher_counts_by_hand() -> None:
    """One 5-gram comes twice: of 7 + 5 words of one letter, the 5 of its second place."""
    text = "a b c d e f g a b c d e"
    measured = find_filter("gopher_repetition")
    judge = measured.make(CurateConfig(), {**dict.fromkeys(measured.limits),
                          "max_duplicate_5gram_chars": 0.0}, None)  # fmt: skip
    found = judge(Text(text))
    assert found is not None
    assert found.detail == f"{5 / 12:.4g}, more than 0"


def test_lengths() -> None:
    assert drop("four little words here", CurateConfig(min_words=5)) == "length.min_words"
    assert drop("four little words here", CurateConfig(min_words=4, max_words=4)) is None
    assert drop("four", CurateConfig(max_chars=3)) == "length.max_chars"


def test_limits_move() -> None:
    config = CurateConfig(quality=["gopher_quality"], limits=["gopher_quality.min_words 3"])
    assert drop("The end of it, and of that.", config) is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"quality": ["gopher_qualty"]}, "did you mean gopher_quality"),
        ({"quality": ["c4"], "limits": ["c4.min_sentence 3"]}, "did you mean c4.min_sentences"),
        ({"limits": ["c4.min_sentences 3"]}, "curate.quality is empty"),
        ({"quality": ["c4"], "limits": ["c4.min_sentences many"]}, "a number or off"),
    ],
)
def test_mistakes_are_one_line(options, words: str) -> None:
    with pytest.raises(InputError) as error:
        make_judges(CurateConfig(**options), None)
    assert words in message(error)


def test_languages() -> None:
    pytest.importorskip("py3langid")
    german = "Das alte Haus stand am Ende der Gasse, und seit Jahren hatte niemand darin gewohnt."
    assert drop(GOOD, CurateConfig(languages=["en"])) is None
    assert drop(german, CurateConfig(languages=["en"])) == "language.de"
    assert drop(german, CurateConfig(languages=["en", "de"])) is None
    with pytest.raises(InputError) as error:
        make_judges(CurateConfig(languages=["xx"]), None)
    assert "no language 'xx'; there are: " in message(error)


def test_overlap_with_evaluation_texts() -> None:
    question = "Natalia sold clips to 48 of her friends in April, and then she sold half as many."
    against = collect([(0, "too short"), (1, question)], 13)
    assert against.num_short == 1
    config = CurateConfig(against=["a.jsonl", "gsm.jsonl"])
    assert drop(f"{GOOD} {question.upper()}", config, against) == "overlap.gsm.jsonl"
    # 13 words of the question are enough, 12 are not
    words = question.split()
    assert drop("Well " + " ".join(words[3:16]), config, against) == "overlap.gsm.jsonl"
    assert drop("Well " + " ".join(words[4:16]), config, against) is None
    # a shorter text counts with all its words
    short = collect([(0, "eight words that are one text of it")], 13)
    assert drop("so: eight words, that are one text of it", config, short) == "overlap.a.jsonl"
