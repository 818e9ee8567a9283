"""On every worker: a dense model trained from random weights, by the recovery's engine.

One task makes the tokenizer, the model's first weights and the rows; what follows is a recovery
without zeros and without a teacher.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from copy import copy
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from cluster.runtime.worker import WorkerContext
from conf.options.data import DataConfig
from conf.schema import Config
from jobs.corpus.builtin import text_digest
from jobs.corpus.sources import heldout_digests, open_source, training_sources
from jobs.runs.artifact import StageWriter, versions
from jobs.runs.folder import disk_errors
from jobs.training.build import figures_of
from jobs.training.engine import gathered_state_dict
from jobs.training.inputs import checked_store
from jobs.training.zero_state import param_numel
from jobs.workers import distill, finetune
from jobs.workers.pretrain_inputs import config_of, given_tokenizer, place_of, tokenizer_folder
from sparsify.data.store import TokenStore
from sparsify.errors import InputError
from sparsify.formats.verify import check_files
from sparsify.models.load import load_tokenizer, model_of
from sparsify.models.save import save_model
from sparsify.pattern import Pattern

MODEL = "model"
"""folder of the result"""

_END = "<|endoftext|>"

_VOCABULARY_CHARS = 50_000_000  # of text, from which a tokenizer is made: more changes little


def make_payload(config: Config, writer: StageWriter, run_dir: Path) -> dict[str, Any]:
    """On the driver: what the task and the workers of the stage are told.

    Args:
        config: with absolute paths.
        writer, run_dir: of the stage.

    Raises:
        InputError: a token store does not fit the run.
    """
    own, scratch, folder = copy(config), writer.scratch, tokenizer_folder(config.pretrain)
    own.distill = config.pretrain.training()  # what the engine reads
    store = None if folder is None else checked_store(config, folder)
    start = scratch / "start"
    return {
        "config": own, "folder": writer.folder, "scratch": scratch, "run_dir": run_dir,
        "store": store or scratch / "rows",
        "heldout": None if own.distill.heldout_every_steps is None else scratch / "heldout",
        "student": start, "dense": start, "teacher": None, "is_dense": True, "rotation": None,
    }  # fmt: skip


def is_prepared(payload: dict[str, Any]) -> bool:
    """Whether all that `prepare` makes is there already."""
    return payload["student"].is_dir() and distill.has_rows(payload)


def prepare(context: WorkerContext, payload: dict[str, Any]) -> None:
    """One task: tokenizer and first weights as a model folder, then the rows as token stores."""
    torch.set_num_threads(context.num_threads)
    start: Path = payload["student"]
    if not start.is_dir():
        partial = start.with_name("start.partial")
        shutil.rmtree(partial, ignore_errors=True)
        with disk_errors(start):
            _write_start(payload["config"], partial)
            partial.rename(start)
    distill.prepare_rows(context, {**payload, "teacher": start})  # whose tokenizer it asks for


def _write_start(config: Config, folder: Path) -> None:
    settings, length = config.pretrain, config.data.sequence_length
    tokenizer = given_tokenizer(settings)
    model_config = config_of(settings, length, tokenizer)
    if tokenizer is None:
        vocabulary = model_config.get_text_config().vocab_size
        context = getattr(model_config.get_text_config(), "max_position_embeddings", length)
        tokenizer = train_tokenizer(vocabulary_texts(config.data), vocabulary, context)
    torch.manual_seed(config.run.seed)
    model = model_of(model_config, place_of(settings), "float32")
    if settings.precision == "bf16":
        model = model.bfloat16()
    save_model(model, tokenizer, folder)


def vocabulary_texts(data: DataConfig) -> Iterator[str]:
    """The documents that a tokenizer is made from: of every source of the training text its share.

    No document equal to a held-out one is among them. Their order is always the same, so that runs
    of other seeds have the same vocabulary.
    """
    held = heldout_digests(data)
    for share, name, side in training_sources(data):
        left = share * _VOCABULARY_CHARS
        for text in open_source(name, side, data, 0):
            if left <= 0:
                break
            if text_digest(text) not in held:
                left -= len(text)
                yield text


def train_tokenizer(texts: Iterator[str], vocab_size: int, context: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer with exactly so many tokens, of which id 0 ends a document.

    Raises:
        InputError: the text does not give that many.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    found = tokenizer.get_vocab_size()
    if found != vocab_size:
        raise InputError(
            f"pretrain: the model has a vocabulary of {vocab_size} tokens, and the training text "
            f"gives {found}; use pretrain.vocab_size={found} or less, give more text, or a "
            "tokenizer with pretrain.tokenizer=FOLDER"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=_END, bos_token=_END, model_max_length=context
    )


def pretrain_on_worker(context: WorkerContext, payload: dict[str, Any]) -> dict[str, Any] | None:
    """On every worker: load, resume if there is a checkpoint, train, write.

    Returns:
        On rank 0 the figures of the run, else None.
    """
    store = TokenStore.open(payload["store"])
    recovery, _ = finetune.train(context, payload["config"], payload, store)
    state = gathered_state_dict(recovery.engine)
    if state is None:
        return None
    # Counted before it is saved: with ZeRO-3 nothing is left of it then.
    model, folder = recovery.engine.module.model, payload["folder"] / MODEL
    num_parameters = sum(map(param_numel, model.parameters()))  # of `state`, tied ones count twice
    with disk_errors(folder):
        save_model(model, load_tokenizer(payload["student"]), folder, state)
    return {**figures_of(recovery), "num_rows": len(store), "num_parameters": num_parameters}


def check_result(folder: Path) -> dict[str, int]:
    """On the driver: that every tensor of what was written can be read and is finite."""
    return check_files(folder, {}, Pattern.parse("2:4"))


def write_card(folder: Path, config: Config, figures: dict[str, Any], command: str) -> None:
    """The README.md of the model folder: data, recipe, tokens, held-out perplexity."""
    settings, length = config.pretrain, config.data.sequence_length
    score = figures["results"]["dense"]
    installed = ", ".join(f"{name} {version}" for name, version in versions().items())
    sources = [(share, Path(name).name) for share, name, _ in training_sources(config.data)]
    text = ", ".join(f"{name} ({share:.0%} of the rows)" for share, name in sources)
    per_parameter = figures["num_tokens"] / figures["num_parameters"]
    card = f"""---
library_name: transformers
---
# A language model of {", ".join(name for _, name in sources)}

Trained from random weights by twofour. It continues such text; it is not meant for anything else.

| | |
|---|---|
| parameters | {figures["num_parameters"]:,} |
| trained on | {figures["num_tokens"]:,} tokens, {per_parameter:,.3g} for each parameter |
| rows | {figures["num_rows"]:,} of {length} tokens, from {text} |
| held-out perplexity | {score["perplexity"]:.3f} per token, on {score["num_tokens"]:,} tokens |

**Recipe.** AdamW ({settings.beta1:g}, {settings.beta2:g}), peak rate {settings.learning_rate:g}
after {settings.num_warmup_steps} steps of warm-up, linear decay to
{settings.min_learning_rate_share:g} times that, weight decay {settings.weight_decay:g} on
matrices, gradient norm clipped at {settings.max_grad_norm:g}, {settings.batch_size} rows per step,
{settings.precision}, seed {config.run.seed}.

Made with `{command}` under {installed}.
"""
    (folder / "README.md").write_text(card, encoding="utf-8")
