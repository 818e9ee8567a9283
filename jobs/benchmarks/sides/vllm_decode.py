"""vLLM's side of the whole model's benchmark, run by the Python of an environment that has it.

    PYTHON vllm_decode.py '{"folder": ..., "batches": [...], "prompt_tokens": 32, ...}' OUT.json

Imports nothing of this project, which need not be installed there.
"""

from __future__ import annotations

import importlib
import json
import random
import sys
import time
from pathlib import Path
from typing import Any


def peak_bytes() -> int:
    """Most memory of this process; `getrusage` would begin with that of the process before it."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """As `sides.decode.measure`, but that a token's seconds are a mean: of 12 after the first.

    Args:
        task: folder (of a model), dtype, threads (one number), batches, budget_s, prompt_tokens,
            new_tokens, vocab_size.
    """
    vllm: Any = importlib.import_module("vllm")
    engine = vllm.LLM(
        model=task["folder"], dtype=task["dtype"], skip_tokenizer_init=True, enforce_eager=True,
        max_model_len=256, max_num_seqs=max(task["batches"]), enable_prefix_caching=False,
    )  # fmt: skip

    def seconds(batch: int, num_tokens: int) -> float:
        drawn = random.Random(f"{batch} {num_tokens}")  # prompts, no secrets  # noqa: S311
        prompts = [
            {"prompt_token_ids": drawn.choices(range(task["vocab_size"]), k=task["prompt_tokens"])}
            for _ in range(batch)
        ]
        sampling = vllm.SamplingParams(
            max_tokens=num_tokens, min_tokens=num_tokens, temperature=0.0, detokenize=False
        )
        started_s = time.perf_counter()
        engine.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - started_s

    seconds(1, 2)
    rows, left_out, last_s, last_batch = [], [], 0.0, 1
    until_s = time.monotonic() + task["budget_s"]
    for batch in task["batches"]:
        if time.monotonic() + last_s * batch / last_batch > until_s:
            left_out.append(batch)
            continue
        first_s = seconds(batch, 1)
        whole_s = seconds(batch, 1 + task["new_tokens"])
        token_s = max(whole_s - first_s, 1e-9) / task["new_tokens"]
        times = {"first_token_s": first_s, "token_s": token_s}
        rows.append({"threads": task["threads"], "batch": batch, **times})
        last_s, last_batch = first_s + whole_s, batch
    files = Path(task["folder"]).glob("*.safetensors")
    return {
        "side": f"vLLM {vllm.__version__}, dense {task['dtype']}", "rows": rows,
        "batches_left_out": left_out, "num_bytes": sum(path.stat().st_size for path in files),
        "peak_bytes": peak_bytes(),
    }  # fmt: skip


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(measure(json.loads(sys.argv[1]))), encoding="utf-8")
