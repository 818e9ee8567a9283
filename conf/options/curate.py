"""What the job curate can be told; rules and help texts as in conf/schema.py."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from cluster.spec import ClusterSpec
from conf.options.data import DataConfig
from sparsify.errors import InputError
from sparsify.params import as_list, check_options, no_duplicates, option

_TOLERANCE = 1e-6  # of proportions that are to sum to 1, which people write in decimals

_HOW = "write it like 'curate.sources=[0.7 a.jsonl,0.3 b.parquet]'"


@dataclass
class CurateConfig:
    """What of a corpus is kept, and in which proportions."""

    sources: list[str] = option([])
    """texts and records, as data.train takes them (files, folders, data sets), in the order in
    which the first of several copies is kept; a share before a name, such as [1 a.jsonl,0.1 b],
    means what curate.mixing says"""
    out: str = option("runs/curated", is_path=True)
    """folder of the result; its data is in the folder data inside"""
    format: str = option("jsonl", one_of=("jsonl", "parquet"))
    """jsonl, or parquet"""
    fields: list[str] = option([])
    """fields of a record whose text is judged; [] finds text, messages, conversations, prompt and
    completion, instruction and output, and the like"""
    as_messages: bool = False
    """write conversations in one form, messages, whatever form they came in, and drop what has no
    answer: so that sources of several forms make one for jobs.finetune"""
    min_chars: int | None = option(None, low=0)
    """fewest characters of a document"""
    max_chars: int | None = option(None, low=0)
    """most characters of a document"""
    min_words: int | None = option(None, low=0)
    """fewest words of a document"""
    max_words: int | None = option(None, low=0)
    """most words of a document"""
    languages: list[str] = option([])
    """languages to keep, such as [en,de]; needs the package py3langid; keep code out of it"""
    min_language_score: float = option(0.0, low=0, high=1)
    """how sure the language must be, 0 to 1"""
    quality: list[str] = option([])
    """rules by counts and ratios: some of c4, fineweb, gopher_quality, gopher_repetition"""
    limits: list[str] = option([])
    """thresholds that differ from the rules' own: RULE and a number or off, such as
    [gopher_quality.min_words 20,c4.curly_brackets off]"""
    against: list[str] = option([])
    """evaluation texts (files, folders, data sets): documents that share words with them are
    dropped"""
    against_words: int = option(13, low=2)
    """words in a row that a document must not share with an evaluation text"""
    exact: bool = True
    """drop documents whose text is that of an earlier one but for case, spaces and punctuation"""
    near: float | None = option(0.8, above=0, high=1)
    """Jaccard similarity of word 5-grams from which documents count as copies; null to keep them"""
    verify: str = option("exact", one_of=("exact", "estimate"))
    """how candidates of MinHash are compared: by all their 5-grams (8 bytes a word on the disk
    meanwhile), or by their hashes"""
    num_hashes: int = option(128, low=16, high=1024)
    """hashes of a document's MinHash signature"""
    mixing: str = option("take", one_of=("take", "proportions"))
    """what shares of curate.sources mean: take, the part of what is left of each source; or
    proportions of the result, which sum to 1"""
    unit: str = option("documents", one_of=("documents", "words", "characters"))
    """what shares and curate.total count"""
    total: int | None = option(None, low=1)
    """size of the result with proportions, in curate.unit; null for as much as there is"""
    when_short: str = option("shrink", one_of=("shrink", "repeat", "error"))
    """with proportions, where a source has too little: the whole result gets smaller, documents of
    it come again, or nothing is written"""
    seed: int = option(0, low=0)
    """of the MinHash functions and of which documents of a source are taken"""
    num_examples: int = option(3, low=0, high=100)
    """documents that the report shows for each reason, and pairs of near copies"""
    shard_bytes: int = option(32_000_000, low=1)
    """text per shard in bytes, about: the piece that one task does at a time, and a file of the
    result"""

    def __post_init__(self) -> None:
        check_options(self, "curate")
        for name in ("fields", "languages", "quality", "against"):
            no_duplicates(f"curate.{name}", getattr(self, name))
        for unit in ("chars", "words"):
            low, high = getattr(self, f"min_{unit}"), getattr(self, f"max_{unit}")
            if low is not None and high is not None and low > high:
                raise InputError(
                    f"curate.min_{unit}={low}: is more than curate.max_{unit}={high}, so that no "
                    "document is kept; swap them"
                )
        shares_of(self)
        if self.as_messages and self.fields:
            raise InputError(
                f"curate.as_messages=true with curate.fields={as_list(self.fields)}: the fields of "
                "conversations are those of their form; leave one of the two out"
            )
        if self.mixing == "take" and self.total is not None:
            raise InputError(
                f"curate.total={self.total}: has a meaning with curate.mixing=proportions alone; "
                "set that, or leave it out"
            )
        if self.when_short == "error" and self.total is None:
            raise InputError(
                "curate.when_short=error: needs curate.total, without which as much is taken as "
                "there is; set it"
            )


def shares_of(config: CurateConfig) -> list[tuple[float, str]]:
    """(share, source) of every entry of curate.sources; without shares each is 1.

    Raises:
        InputError: only some have a share, a share is out of range, a source is named twice, or
            proportions do not sum to 1.
    """
    entries = [_share_and_source(entry) for entry in config.sources]
    field_ = f"curate.sources={as_list(config.sources)}"
    names = [name for _, name in entries]
    for name in names:
        if not name or names.count(name) > 1:
            what = f"names {name} twice" if name else "has an entry without a source"
            raise InputError(f"{field_}: {what}; {_HOW}")
    shares = [share for share, _ in entries if share is not None]
    if shares and len(shares) < len(entries):
        raise InputError(f"{field_}: some sources have a share and some have none; {_HOW}")
    most = 1.0
    for share in shares:
        if not (math.isfinite(share) and 0 < share <= most):
            raise InputError(f"{field_}: the share {share:g} is not over 0 and at most 1; {_HOW}")
    if config.mixing == "proportions" and entries:
        total = sum(shares)
        if not shares or abs(total - 1) > _TOLERANCE:
            what = f"sum to {total:.6g}" if shares else "are missing"
            raise InputError(
                f"{field_}: the shares {what}, and proportions of a result sum to 1; {_HOW}"
            )
    return [(1.0 if share is None else share, name) for share, name in entries]


def _share_and_source(entry: str) -> tuple[float | None, str]:
    share, _, source = entry.strip().partition(" ")
    try:
        return float(share), source.strip()
    except ValueError:
        return None, entry.strip()


@dataclass
class CurateJobConfig:
    """Make a better corpus of a corpus (job curate)."""

    data: DataConfig = field(default_factory=DataConfig)
    curate: CurateConfig = field(default_factory=CurateConfig)
    cluster: ClusterSpec = field(default_factory=ClusterSpec)
