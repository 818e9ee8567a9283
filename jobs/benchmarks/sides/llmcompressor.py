"""llm-compressor's side of the pruning comparison. Stands alone: its Python has only its packages.

Started as `python -P llmcompressor.py ORDER MODEL ROWS OUT RESULT THREADS BATCH_SIZE`. Settings
are its own defaults (blocks of 128 columns, damping 0.01) but for what the comparison fixes: 2:4,
rows in the order given, the head left dense, the batch size, and inputs of the dense model where
ORDER is dense.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path


def now() -> tuple[float, float]:
    """Seconds that have passed, and seconds that the CPUs have worked for this process."""
    return time.perf_counter(), time.process_time()


BEGIN = ("", *now())

# After the clock has started: the time of these imports is a figure of its own.
import torch
import transformers.models.llama.modeling_llama  # noqa: F401  # not on first use
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def prune_folder(
    order: str,
    model: Path,
    rows: Path,
    out: Path,
    result: Path,
    num_threads: int,
    batch_size: int,
) -> None:
    """Prune a model folder 2:4 with SparseGPTModifier; write seconds and peak memory as JSON."""
    torch.set_num_threads(num_threads)
    token_ids = load_file(rows)["input_ids"]
    marks = [("import", *now())]
    imported_bytes = peak_memory_bytes()
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    marks.append(("load", *now()))
    oneshot(
        model=dense,
        processor=tokenizer,
        dataset=Dataset.from_dict({"input_ids": token_ids.tolist()}),
        recipe=[SparseGPTModifier(sparsity=0.5, mask_structure="2:4", ignore=["re:.*lm_head"])],
        batch_size=batch_size,
        num_calibration_samples=len(token_ids),
        max_seq_length=token_ids.shape[1],
        shuffle_calibration_samples=False,
        pipeline="sequential",
        propagate_error=order != "dense",
    )
    marks.append(("prune", *now()))
    dense.save_pretrained(out)
    tokenizer.save_pretrained(out)
    marks.append(("save", *now()))
    steps = list(itertools.pairwise([BEGIN, *marks]))
    figures = {
        "seconds": {name: wall - begin[1] for begin, (name, wall, _) in steps},
        "cpu_seconds": {name: cpu - begin[2] for begin, (name, _, cpu) in steps},
        "peak_bytes": peak_memory_bytes(),
        "imported_bytes": imported_bytes,
    }
    result.write_text(json.dumps(figures), encoding="utf-8")


def peak_memory_bytes() -> int:
    """Most memory this process has held since it started (resident set, Linux)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


if __name__ == "__main__":
    order, model, rows, out, result, num_threads, batch_size = sys.argv[1:]
    prune_folder(
        order, Path(model), Path(rows), Path(out), Path(result), int(num_threads), int(batch_size)
    )
