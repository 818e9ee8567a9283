"""How `jobs.pretrain` makes its text, tokenizer, model and model card."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cluster.preempt import telling
from conf.options.data import DataConfig
from conf.options.pretrain import PretrainConfig
from jobs.corpus.builtin import HELD_OUT_SHARE, PACKAGES, package_documents, stdlib_documents
from jobs.corpus.documents import Documents
from jobs.corpus.rows import load_rows
from jobs.corpus.sources import open_source, source_documents
from jobs.runs.artifact import versions
from jobs.runs.display import Display
from jobs.runs.folder import disk_errors
from sparsify.data.rows import token_rows
from sparsify.data.split import shuffled
from sparsify.errors import InputError
from sparsify.evaluation.perplexity import evaluate_rows
from sparsify.models.save import save_model
from sparsify.training.pretrain import pretrain

_END = "<|endoftext|>"

_USUAL_ROWS = 256  # what the pipeline scores by default: 65,536 tokens


def make_model(config: PretrainConfig) -> Path:
    """Tokenizer, data, training, held-out score, model card; the folder appears at the end.

    Raises:
        InputError: the output folder exists, or there is too little text.
    """
    out = Path(config.out)
    if out.exists():
        raise InputError(f"out={out}: exists; move it away or choose another folder with out=")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise InputError("device=cuda: there is no GPU here; use device=cpu")
    partial = out.with_name(f".{out.name}.partial")
    with disk_errors(out):
        partial.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(config.num_threads)
    started_s = time.monotonic()
    with (
        telling(lambda: "pretrain keeps no state: the same command starts over"),
        Display() as display,
    ):
        display.start_stage("pretrain")
        if config.data != "code":
            found = source_documents(config.data, None, DataConfig())
            for line in found.remarks.lines() if isinstance(found, Documents) else []:
                display.say(f"warning: data={config.data}: {line}")
        vocabulary_texts, texts, heldout = _read_documents(config)
        tokenizer = _train_tokenizer(vocabulary_texts, config)
        texts = [texts[index] for index in shuffled(len(texts), config.seed)]
        num_rows = config.num_tokens // config.sequence_length
        rows = token_rows(texts, tokenizer, config.sequence_length, num_rows)
        if len(rows) < num_rows:
            raise InputError(
                f"num_tokens={config.num_tokens}: the text has {rows.num_tokens} tokens; ask for "
                "fewer, give more text, or raise stdlib_repeats"
            )
        held_rows = token_rows(heldout, tokenizer, config.sequence_length)
        torch.manual_seed(config.seed)
        model = _new_model(config).to(config.device)

        def on_step(step: int, total: int, loss: float) -> None:
            event = {"kind": "progress", "done": step + 1, "total": total}
            display.on_event({**event, "text": f"steps, loss {loss:.4f}"})

        num_tokens = pretrain(model, rows.ids_NT, config, config.seed, on_step)
        sums = evaluate_rows(model, held_rows, config.batch_size)
        usual = DataConfig() if config.data == "code" else DataConfig(calibration=config.data)
        usual_rows, _ = load_rows(usual, "heldout", tokenizer, _USUAL_ROWS, config.seed)
        facts = {
            "num_tokens": num_tokens,
            "perplexity": sums.perplexity,
            "usual_perplexity": evaluate_rows(model, usual_rows, config.batch_size).perplexity,
            "num_heldout_tokens": sums.num_tokens,
            "duration_s": time.monotonic() - started_s,
            "versions": versions(),
        }
        save_model(model, tokenizer, partial)
        (partial / "README.md").write_text(_model_card(model, config, facts), encoding="utf-8")
        partial.rename(out)
        display.finish_stage("pretrain", f"held-out perplexity {sums.perplexity:.3f}")
    return out


def _read_documents(config: PretrainConfig) -> tuple[list[str], list[str], list[str]]:
    """Texts for the vocabulary, for training and held-out ones, without held-out text in the first.

    From code: the standard library for the vocabulary, repeated beside the packages for training.
    """
    if config.data != "code":
        source = DataConfig(calibration=config.data)
        heldout = list(open_source(config.data, True, source))
        texts = [t for t in open_source(config.data, False, source) if t not in set(heldout)]
        return texts, texts, heldout
    heldout = list(stdlib_documents(held_out=True))
    stdlib = list(dict.fromkeys(stdlib_documents(held_out=False)))
    packages = [text for text in dict.fromkeys(package_documents()) if text not in set(heldout)]
    return stdlib, stdlib * config.stdlib_repeats + packages, heldout


def _train_tokenizer(texts: list[str], config: PretrainConfig) -> Any:
    """A byte-level BPE tokenizer of the training text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=_END, bos_token=_END,
        model_max_length=config.sequence_length,
    )  # fmt: skip


def _new_model(config: PretrainConfig) -> Any:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.hidden_size // config.num_heads,
            max_position_embeddings=config.sequence_length,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def _model_card(model: Any, config: PretrainConfig, facts: dict[str, Any]) -> str:
    """The README.md of a model folder: data, recipe, tokens, held-out perplexity, limits."""
    num_parameters = sum(p.numel() for p in model.parameters())
    installed = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    is_code = config.data == "code"
    front = "license: apache-2.0\nlanguage: [code]\n" if is_code else ""
    title, what, data = _code_words(config) if is_code else _other_words(config)
    prose = ", most of them the prose of pydoc_data/topics.py" if is_code else ""
    command = "python -m jobs.pretrain" + ("" if is_code else f" data={Path(config.data).name} ...")
    return f"""---
library_name: transformers
{front}---
# {title}

A Llama-architecture model of {what}, {num_parameters:,} parameters, trained from
scratch by this project. It predicts such text; it is not meant for anything else.

| | |
|---|---|
| parameters | {num_parameters:,} ({config.num_layers} blocks of width {config.hidden_size}, feed-forward {config.intermediate_size}, tied embeddings) |
| tokenizer | byte-level BPE, {config.vocab_size} tokens, trained on the training text |
| context | {config.sequence_length} tokens |
| trained on | {facts["num_tokens"]:,} tokens ({facts["num_tokens"] / num_parameters:.0f} per parameter) |
| held-out perplexity | {facts["usual_perplexity"]:.3f} per token on the 65,536 tokens that `python -m jobs.evaluate` scores by default |
| | {facts["perplexity"]:.3f} on all {facts["num_heldout_tokens"]:,} held-out tokens{prose} |
| time | {facts["duration_s"] / 60:.0f} minutes on {config.device} |

**Data.** {data}

**Recipe.** AdamW (0.9, 0.95), peak rate {config.learning_rate:g} after {config.num_warmup_steps}
steps of warm-up, linear decay to zero, weight decay {config.weight_decay:g} on matrices, gradient
norm clipped at {config.max_grad_norm:g}, {config.batch_size} rows of {config.sequence_length}
tokens per step, {"bfloat16 autocast" if config.bf16 else "float32"}, seed {config.seed}.
Made with `{command}` under {installed}.
"""


def _code_words(config: PretrainConfig) -> tuple[str, str, str]:
    """Title, kind of text and data of a model of the built-in code."""
    data = f"""The Python standard library without its tests, {config.stdlib_repeats} times, and once the
Python sources of these installed packages, at most 16 MB each: {", ".join(PACKAGES)}. A file of the
standard library is held out when the first four bytes of the SHA-256 of its relative path, read as
a fraction, are below {HELD_OUT_SHARE}; a file equal to a held-out one is not trained on. The sources
are under their own permissive licences (PSF, Apache-2.0, BSD, MIT)."""
    return "The embedded model of twofour", "Python source code", data


def _other_words(config: PretrainConfig) -> tuple[str, str, str]:
    """The same of a model of the user's text."""
    name = Path(config.data).name
    data = f"""The documents of {name}, once; one in twenty is held out, by the SHA-256 of its text
(sparsify/data/split.py), or the end of every document where there are fewer than twenty."""
    return f"A small language model of {name}", f"the text of {name}", data
