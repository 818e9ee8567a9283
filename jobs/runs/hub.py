"""Models of the Hugging Face Hub: brought into its cache by its own client, known by their commit.

The only importer of huggingface_hub. The cache (HF_HOME), the token (HF_TOKEN, `hf auth login`) and
offline mode (HF_HUB_OFFLINE) are those of everything else that uses the Hub. The driver downloads;
workers read the folder that it names, so that on several nodes the cache has to be on the disk that
they share. `NAME@REVISION` names a branch, a tag or a commit; without one it is `main`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import huggingface_hub  # 3 ms: it loads its parts when they are asked for

from conf.options.model import HUB_NAME
from sparsify.errors import InputError, first_line
from sparsify.files import readable, resolve_path
from sparsify.formats.sparse_folder import hub_reference

_INDEX = "model.safetensors.index.json"

_DESCRIBING = [
    "config.json", "generation_config.json", _INDEX, "tokenizer.json", "tokenizer_config.json",
    "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json", "*.tiktoken",
    "chat_template.jinja", "chat_template.json", "sparsity.json", "sparsity/*.safetensors",
]  # fmt: skip
"""What says how a model is built and how it tokenises; a few MB"""


def model_folder(option: str, text: str, fetch: bool = True) -> Path:
    """The absolute folder of a model: one that is here, or else one of the Hub by its name.

    Args:
        option: that `text` was given for.
        text: a folder, `embedded`, or ORGANISATION/NAME or ORGANISATION/NAME@REVISION.
        fetch: download the weights too; False for what describes them alone.

    Raises:
        InputError: the Hub does not have it, does not give it, or cannot be reached. A folder may
            turn out to be missing, or no model: see `sparsify.models.load.check_checkpoint`.
    """
    with readable(f"{option}={text}"):
        folder = resolve_path(text).absolute()
        if folder.exists():
            return folder
    # The folder of an earlier download, which lay in another cache.
    name = hub_reference(folder) or text
    return _from_hub(option, name, fetch) if HUB_NAME.fullmatch(name) else folder


def _from_hub(option: str, text: str, fetch: bool) -> Path:
    name, _, revision = text.partition("@")
    with _refusals(option, text):
        found = huggingface_hub.snapshot_download(
            name, revision=revision or None, allow_patterns=_DESCRIBING
        )
        folder = Path(found)
        if fetch:
            huggingface_hub.snapshot_download(
                name, revision=folder.name, allow_patterns=_weights(folder)
            )
    return folder


def cached_config(text: str) -> Path | None:
    """The folder in the cache where a Hub model's config.json lies; None if it is not there, or
    `text` is no name of the Hub. Asks the network nothing."""
    if not HUB_NAME.fullmatch(text):
        return None
    name, _, revision = text.partition("@")
    found = huggingface_hub.try_to_load_from_cache(name, "config.json", revision=revision or None)
    return Path(found).parent if isinstance(found, str) else None


def has_weights(folder: Path) -> bool:
    """Whether all files of a model's weights are there; true of a folder that is not the Hub's."""
    is_hub = hub_reference(folder) is not None
    return not is_hub or all((folder / name).is_file() for name in _weights(folder))


def bytes_to_download(option: str, folder: Path) -> int:
    """Bytes of a Hub model's weights that are not in the cache yet; 0 for a folder of another kind.

    Raises:
        InputError: as `model_folder`.
    """
    reference = hub_reference(folder)
    if reference is None or has_weights(folder):
        return 0
    name, _, commit = reference.partition("@")
    with _refusals(option, reference):
        files = huggingface_hub.snapshot_download(
            name, revision=commit, allow_patterns=_weights(folder), dry_run=True
        )
    return sum(file.file_size or 0 for file in files if file.will_download)


def _weights(folder: Path) -> list[str]:
    """The files of a model's weights by its index; other files of weights may lie beside them."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or damaged
        index = json.loads((folder / _INDEX).read_bytes())
        return sorted({str(name) for name in index["weight_map"].values()})
    return ["model.safetensors"]


@contextmanager
def _refusals(option: str, text: str) -> Iterator[None]:
    """What the Hub or its client says, as one line."""
    from huggingface_hub import constants, errors  # 0.3 s, which only models of the Hub cost

    where, name = f"{option}={text}", text.partition("@")[0]
    try:
        yield
    except errors.GatedRepoError:
        raise InputError(
            f"{where}: access to this model has to be granted; accept its terms at "
            f"{constants.ENDPOINT}/{name} and log in with 'hf auth login' or HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise InputError(
            f"{where}: there is no such folder here, and no such model at {constants.ENDPOINT}, "
            "or it is private and needs 'hf auth login' or HF_TOKEN; check the name"
        ) from None
    except errors.RevisionNotFoundError:
        raise InputError(
            f"{where}: the model has no such branch, tag or commit; write NAME@REVISION"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.DryRunError) as error:
        is_offline = constants.HF_HUB_OFFLINE
        why = "HF_HUB_OFFLINE is set" if is_offline else f"the Hub does not answer: {_cause(error)}"
        raise InputError(
            f"{where}: there is no such folder here, the Hub's cache {constants.HF_HUB_CACHE} does "
            f"not hold all of that model, and {why}; download it where there is a network with "
            f"'hf download {name}', or give a folder"
        ) from None
    except (errors.HFValidationError, OSError) as error:  # HTTP errors are OSErrors too
        raise InputError(f"{where}: cannot be downloaded ({first_line(error)})") from None


def _cause(error: BaseException) -> str:
    return first_line(error.__cause__ or error)
