"""Documents that share words in a row with evaluation texts; see `jobs.curation.overlap`."""

from __future__ import annotations

from pathlib import PurePath

from conf.options.curate import CurateConfig
from jobs.curation.filters._base import Against, Drop, Filter, Judge, Limits
from jobs.curation.text import Text


def _make(config: CurateConfig, limits: Limits, against: Against | None) -> Judge:
    names = [PurePath(name).name or name for name in config.against]

    def judge(text: Text) -> Drop | None:
        found = against.find(text) if against is not None else None
        if found is None:
            return None
        source, words = found
        return Drop(names[source], f"shares '{words}'")

    return judge


FILTER = Filter("words in a row that an evaluation text has", _make, cost=2)
