"""What a recovery is given, held against what the run is about: a token store, a teacher's samples.

On the driver and on workers; `given_digests` is what decides the recovered weights.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from conf.schema import Config
from sparsify.data.store import TokenStore, is_store
from sparsify.data.teacher_samples import TeacherSamples
from sparsify.errors import InputError
from sparsify.formats.sparse_folder import model_fingerprint
from sparsify.models.load import load_tokenizer


def given_store(config: Config) -> Path | None:
    """The token store that data.train is, if it is one."""
    train = config.data.train
    folder = None if train is None else Path(train).expanduser()
    return folder if folder is not None and is_store(folder) else None


def checked_store(config: Config, teacher: Path) -> Path | None:
    """`given_store`, held against what this run reads.

    Raises:
        InputError: rows of another length, or made with another tokenizer.
    """
    folder = given_store(config)
    if folder is None:
        return None
    store = TokenStore.open(folder)
    if store.sequence_length != config.data.sequence_length:
        raise InputError(
            f"data.train={folder}: rows of {store.sequence_length} tokens, data.sequence_length is "
            f"{config.data.sequence_length}; set data.sequence_length={store.sequence_length}, or "
            "tokenise the text again"
        )
    store.check_tokenizer(load_tokenizer(teacher), str(teacher))
    return folder.absolute()


def given_digests(config: Config) -> dict[str, str]:
    """For identities: the digests of the store and of the teacher's samples that were given."""
    store, cache = given_store(config), open_cache(config)
    found = {} if store is None else {"train": TokenStore.open(store).digest}
    return found if cache is None else {**found, "teacher_cache": cache.digest}


def open_cache(config: Config) -> TeacherSamples | None:
    """The samples of the teacher that stand for it, None where the teacher itself is asked.

    Raises:
        InputError: the folder is not a whole cache.
    """
    folder = config.distill.teacher_cache
    return None if folder is None else TeacherSamples.open(Path(folder).absolute())


def check_cache(config: Config, teacher: Path) -> None:
    """Require that the cache, if there is one, was drawn from this teacher for these rows.

    Raises:
        InputError: not a cache, or one of another store, teacher, temperature or kind of rows.
    """
    cache = open_cache(config)
    if cache is None:
        return
    field, facts = f"distill.teacher_cache={config.distill.teacher_cache}", cache.facts
    store, isolates = given_store(config), config.data.isolate_documents
    if store is None:
        raise InputError(
            f"{field}: its samples belong to the rows of a token store, and data.train="
            f"{config.data.train} is none; give the store that it was made with"
        )
    digest, sha256 = TokenStore.open(store).digest, model_fingerprint(teacher)
    if digest != facts.store_digest:
        raise InputError(
            f"{field}: drawn for the rows of another store (digest {facts.store_digest[:12]}) than "
            f"data.train={store} ({digest[:12]}); use that store, or run python -m jobs.teach "
            "with this one"
        )
    if sha256 != facts.teacher_sha256:
        raise InputError(
            f"{field}: drawn from another teacher (fingerprint {facts.teacher_sha256[:12]}) than "
            f"{teacher} ({sha256[:12]}); use that one, or run python -m jobs.teach with this one"
        )
    if facts.temperature != config.distill.temperature:
        raise InputError(
            f"{field}: drawn at temperature {facts.temperature:g}, and distill.temperature="
            f"{config.distill.temperature:g}; use distill.temperature={facts.temperature:g}, or "
            f"run python -m jobs.teach with teach.temperature={config.distill.temperature:g}"
        )
    if facts.isolate_documents != isolates:
        said, now = str(facts.isolate_documents).lower(), str(isolates).lower()
        raise InputError(
            f"{field}: drawn with data.isolate_documents={said}, and here it is {now}; use "
            f"data.isolate_documents={said}, or run python -m jobs.teach with "
            f"data.isolate_documents={now}"
        )


def check_words(cache: TeacherSamples, student: nn.Module) -> None:
    """Require that the student's head has as many ids as the teacher's.

    Raises:
        InputError: it has not.
    """
    found = student.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
    if found != cache.facts.num_words:
        raise InputError(
            f"distill: the student has {found} tokens, the teacher of {cache.folder} "
            f"{cache.facts.num_words}; teacher and student must share the vocabulary"
        )
