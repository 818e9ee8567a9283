"""Train a small model from scratch, by default on source code that every installation carries.

`python -m jobs.pretrain` writes a model folder with its model card. One process, no cluster: it is
how `model.path=embedded` was made, kept as a command so that anybody can make it again, or another
one of other text (`data=books.txt`) to try a method on.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.cli.command import Command
from jobs.cli.main import main

if TYPE_CHECKING:
    from conf.options.pretrain import PretrainConfig


def run(config: PretrainConfig) -> Path:
    """Tokenizer, data, training, held-out score, model card; the folder appears at the end.

    Raises:
        InputError: the output folder exists, or there is too little text.
    """
    import torch

    from conf.options.data import DataConfig
    from jobs.corpus.rows import load_rows
    from jobs.runs.artifact import versions
    from jobs.runs.display import Display
    from jobs.runs.folder import disk_errors
    from jobs.workers.pretrain import (
        USUAL_ROWS,
        model_card,
        new_model,
        read_documents,
        train_tokenizer,
    )
    from sparsify.data.rows import token_rows
    from sparsify.data.split import shuffled
    from sparsify.errors import InputError
    from sparsify.evaluation.perplexity import evaluate_rows
    from sparsify.models.load import save_model
    from sparsify.training.pretrain import PretrainParams, pretrain

    out = Path(config.out)
    if out.exists():
        raise InputError(f"out={out}: exists; move it away or choose another folder with out=")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise InputError("device=cuda: there is no GPU here; use device=cpu")
    partial = out.with_name(f".{out.name}.partial")
    with disk_errors(out):
        partial.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(config.num_threads)
    begun_s = time.monotonic()
    with Display() as display:
        display.start_stage("pretrain")
        vocabulary_texts, texts, heldout = read_documents(config)
        tokenizer = train_tokenizer(vocabulary_texts, config)
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
        model = new_model(config).to(config.device)
        params = PretrainParams(
            config.batch_size, config.learning_rate, config.num_warmup_steps,
            config.weight_decay, config.max_grad_norm, config.bf16,
        )  # fmt: skip

        def on_step(step: int, total: int, loss: float) -> None:
            event = {"kind": "progress", "done": step + 1, "total": total}
            display.on_event({**event, "text": f"steps, loss {loss:.4f}"})

        num_tokens = pretrain(model, rows.ids_NT, params, config.seed, on_step)
        sums = evaluate_rows(model, held_rows, config.batch_size)
        usual = DataConfig() if config.data == "code" else DataConfig(calibration=config.data)
        usual_rows, _ = load_rows(usual, "heldout", tokenizer, USUAL_ROWS, config.seed)
        facts = {
            "num_tokens": num_tokens,
            "perplexity": sums.perplexity,
            "usual_perplexity": evaluate_rows(model, usual_rows, config.batch_size).perplexity,
            "num_heldout_tokens": sums.num_tokens,
            "duration_s": time.monotonic() - begun_s,
            "versions": versions(),
        }
        save_model(model, tokenizer, partial)
        (partial / "README.md").write_text(model_card(model, config, facts), encoding="utf-8")
        partial.rename(out)
        display.finish_stage("pretrain", f"held-out perplexity {sums.perplexity:.3f}")
    return out


def describe_plan(config: PretrainConfig) -> list[str]:
    """What `run` would do, in lines for a person; touches nothing."""
    step_tokens = config.batch_size * config.sequence_length
    return [
        f"pretrain: one process on {config.device}, {config.num_threads} threads, no cluster",
        f"  model: {config.num_layers} blocks, hidden_size {config.hidden_size}, "
        + f"vocabulary {config.vocab_size}",
        f"  steps: {config.num_tokens // step_tokens} of {step_tokens} tokens",
        f"  output: {config.out}",
    ]


if __name__ == "__main__":
    main(Command("pretrain", run, describe_plan))
