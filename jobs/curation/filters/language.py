"""Documents in another language, as py3langid says; its model is inside the package.

Naive Bayes over byte n-grams (Lui, Baldwin 2012). Program code and very short texts have no
language that it could know: keep them out of this filter.
"""

from __future__ import annotations

from functools import cache

from py3langid.langid import MODEL_FILE, LanguageIdentifier

from conf.options.curate import CurateConfig
from jobs.curation.filters._base import Against, Drop, Filter, Judge, Limits
from jobs.curation.text import Text
from sparsify.errors import InputError
from sparsify.params import as_list

_NUM_CHARS = 20_000  # of a document, which say enough of it


@cache
def _identifier() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _make(config: CurateConfig, limits: Limits, against: Against | None) -> Judge:
    identifier, wanted = _identifier(), set(config.languages)
    if unknown := sorted(wanted - set(identifier.labels)):
        raise InputError(
            f"curate.languages={as_list(config.languages)}: no language {unknown[0]!r}; there are: "
            f"{' '.join(sorted(identifier.labels))}"
        )

    def judge(text: Text) -> Drop | None:
        language, score = identifier.classify(text.text[:_NUM_CHARS])
        if language not in wanted:
            return Drop(language, f"{language}, score {score:.2f}")
        if score < config.min_language_score:
            least = f"{config.min_language_score:g}"
            return Drop("unsure", f"{language}, score {score:.2f}, less than {least}")
        return None

    return judge


FILTER = Filter("another language", _make, cost=3)
