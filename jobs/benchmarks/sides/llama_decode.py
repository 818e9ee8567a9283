"""llama.cpp's side of the whole model's benchmark, run by the Python of an environment that has it.

    PYTHON llama_decode.py '{"file": ..., "sizes": {...}, "batches": [...], ...}' OUT.json

That environment has llama-cpp-python and gguf. Imports nothing of this project, which need not be
installed there.
"""

from __future__ import annotations

import importlib
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

_BLOCK = 32  # weights that share a scale in Q4_0: float16, then 16 bytes of codes

_SCALE = 0.005  # codes are -8 to 7: weights of about 0.02, as in the other sides


def write_model(file: Path, sizes: dict[str, int], vocab_size: int) -> None:
    """A random Llama: linear layers in Q4_0, embeddings and head one matrix in float16.

    Args:
        sizes: as of a transformers' LlamaConfig.
    """
    np: Any = importlib.import_module("numpy")
    gguf: Any = importlib.import_module("gguf")
    random = np.random.default_rng(0)
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    heads, narrow_heads = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    narrow = hidden // heads * narrow_heads
    partial = file.with_name(f".{file.name}.partial")
    writer = gguf.GGUFWriter(str(partial), "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_block_count(sizes["num_hidden_layers"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(narrow_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_vocab_size(vocab_size)
    writer.add_tokenizer_model("none")

    def add_layer(name: str, rows: int, columns: int) -> None:
        blocks = random.integers(0, 256, (rows, columns // _BLOCK, 18), dtype=np.uint8)
        blocks[:, :, :2] = np.array([_SCALE], np.float16).view(np.uint8)
        kind = gguf.GGMLQuantizationType.Q4_0
        writer.add_tensor(name, blocks.reshape(rows, -1), raw_dtype=kind)

    table = random.standard_normal((vocab_size, hidden), dtype=np.float32) * 0.02
    writer.add_tensor("token_embd.weight", table.astype(np.float16))
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    for index in range(sizes["num_hidden_layers"]):
        block = f"blk.{index}"
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"{block}.{norm}.weight", np.ones(hidden, np.float32))
        add_layer(f"{block}.attn_q.weight", hidden, hidden)
        add_layer(f"{block}.attn_k.weight", narrow, hidden)
        add_layer(f"{block}.attn_v.weight", narrow, hidden)
        add_layer(f"{block}.attn_output.weight", hidden, hidden)
        add_layer(f"{block}.ffn_gate.weight", inner, hidden)
        add_layer(f"{block}.ffn_up.weight", inner, hidden)
        add_layer(f"{block}.ffn_down.weight", hidden, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(file)


class Prompts:
    """`batch` prompts that are answered token by token, greedy."""

    def __init__(self, model: Any, batch: int, num_threads: int, task: dict[str, Any]) -> None:
        self.lib: Any = importlib.import_module("llama_cpp")
        self.np: Any = importlib.import_module("numpy")
        self.batch, self.vocab_size = batch, task["vocab_size"]
        self.length = task["prompt_tokens"]
        options = self.lib.llama_context_default_params()
        options.n_ctx = batch * (self.length + task["new_tokens"] + 1)
        options.n_batch = options.n_ubatch = batch * self.length
        options.n_seq_max = batch
        options.n_threads = options.n_threads_batch = num_threads
        self.context = self.lib.llama_init_from_model(model, options)
        self.tokens = self.lib.llama_batch_init(batch * self.length, 0, 1)

    def times_s(self, num_tokens: int) -> list[float]:
        """Seconds until each token has come, of all prompts at once."""
        random = self.np.random.default_rng(self.batch)
        given = random.integers(0, self.vocab_size, (self.batch, self.length))
        found, position = [], 0
        started_s = time.perf_counter()
        for _ in range(num_tokens):
            given = self._step(given, position)
            found.append(time.perf_counter() - started_s)
            position = self.length + len(found) - 1
        return found

    def close(self) -> None:
        """Give the context's memory back."""
        self.lib.llama_batch_free(self.tokens)
        self.lib.llama_free(self.context)

    def _step(self, given: Any, position: int) -> Any:
        """The next tokens (batch, 1) after `given` (batch, number of tokens)."""
        tokens, ends, count = self.tokens, [], 0
        for sequence, own in enumerate(given):
            for offset, token in enumerate(own):
                tokens.token[count], tokens.pos[count] = int(token), position + offset
                tokens.n_seq_id[count], tokens.seq_id[count][0] = 1, sequence
                tokens.logits[count] = offset + 1 == len(own)
                count += 1
            ends.append(count - 1)
        tokens.n_tokens = count
        if self.lib.llama_decode(self.context, tokens):
            raise RuntimeError("llama_decode failed")
        logits = [self.lib.llama_get_logits_ith(self.context, end) for end in ends]
        return self.np.array([
            [self.np.ctypeslib.as_array(own, (self.vocab_size,)).argmax()] for own in logits
        ])  # fmt: skip


def answer(model: Any, batch: int, num_threads: int, task: dict[str, Any]) -> list[float]:
    """Seconds until each token of `batch` prompts at once has come."""
    prompts = Prompts(model, batch, num_threads, task)
    found = prompts.times_s(1 + task["new_tokens"])
    prompts.close()
    return found


def peak_bytes() -> int:
    """Most memory of this process; `getrusage` would begin with that of the process before it."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """As `sides.decode.measure`.

    Args:
        task: file (of the model, made if it is not there), sizes, vocab_size, threads (list),
            batches, budget_s, prompt_tokens, new_tokens.
    """
    lib: Any = importlib.import_module("llama_cpp")
    file = Path(task["file"])
    if not file.is_file():
        write_model(file, task["sizes"], task["vocab_size"])
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(str(file).encode(), lib.llama_model_default_params())
    if not model:
        raise RuntimeError(f"llama.cpp cannot read {file}")
    rows, left_out, most = [], [], max(task["threads"])
    answer(model, 1, most, task)  # weights are read, threads are there
    until_s = time.monotonic() + task["budget_s"]
    for threads in sorted(task["threads"]):
        last_s, last_batch = 0.0, 1
        for batch in task["batches"] if threads == most else task["batches"][:1]:
            if time.monotonic() + last_s * batch / last_batch > until_s:
                left_out.append(batch)
                continue
            started_s = time.monotonic()
            first_s, *later_s = answer(model, batch, threads, task)
            last_s, last_batch = time.monotonic() - started_s, batch
            pairs = zip([first_s, *later_s], later_s, strict=False)
            token_s = statistics.median(after - before for before, after in pairs)
            times = {"first_token_s": first_s, "token_s": token_s}
            rows.append({"threads": threads, "batch": batch, **times})
    return {
        "side": f"llama.cpp (llama-cpp-python {lib.__version__}), dense Q4_0", "rows": rows,
        "batches_left_out": left_out, "num_bytes": file.stat().st_size,
        "peak_bytes": peak_bytes(),
    }  # fmt: skip


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(measure(json.loads(sys.argv[1]))), encoding="utf-8")
