"""How fast one process reads training rows from a store, against what the GPUs of a node take in.

Shape suffixes: N rows, T tokens of a row, B bytes of a row's document starts.
"""

from __future__ import annotations

import os
import shutil
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jobs.benchmarks.support.arguments import add_option, settings_of
from jobs.benchmarks.support.record import Outcome, Table, Target, gigabytes
from jobs.corpus.builtin import stdlib_documents
from sparsify.data.order import TrainingOrder, largest_remainder
from sparsify.data.store import (
    FORMAT,
    ID_TYPES,
    Shard,
    StoreSource,
    TokenStore,
    id_type,
)
from sparsify.data.store_write import shard_name, write_manifest, write_shard
from sparsify.errors import InputError
from sparsify.files import file_sha256
from sparsify.models.load import load_tokenizer
from sparsify.tensors import write_tensors

SUMMARY = "training rows read by one process, compared with what a node of GPUs needs"

EXAMPLES = ("data --store-gb 4 --save",)

_TARGET_RATIO = 10.0

_SHARD_ROWS = 2048

_MEAN_DOCUMENT_TOKENS = 1000

_SHARES = (0.7, 0.25, 0.05)

_NOTES = (
    "rows come in training order from three sources of random tokens (weights 0.7, 0.25, 0.05), "
    "one micro-batch at a time, as int64 ids and positions; the copy to a GPU is not measured",
    "cached: every row was read before; cold: the pages of the files were dropped from the page "
    "cache first (posix_fadvise), and no row comes twice; the disk is that of --workdir, and the "
    "host of a virtual machine may hold the files all the same",
    "needed: 8 GPUs of a 32-GPU run at 6,800 tokens/s each; one process of this benchmark is "
    "compared with the whole node, which has 8 of them",
    "tokenising: documents of the standard library with the tokenizer of --model, one thread, with "
    "packing and writing the shard",
)


class _AnyTokenizer:
    """Stands for the tokenizer of random tokens: its vocabulary alone counts."""

    bos_token_id = None
    eos_token_id = 0

    def __init__(self, vocab_size: int) -> None:
        self._last = vocab_size - 1

    def get_vocab(self) -> dict[str, int]:
        """One token, the last."""
        return {"last": self._last}

    def __call__(self, _: str, **__: Any) -> dict[str, list[int]]:
        """No tokens."""
        return {"input_ids": []}


def add_arguments(parser: ArgumentParser) -> None:
    """Options of the command."""
    add_option(parser, "--store-gb", 2.0, "size of the store, in 1e9 bytes")
    add_option(parser, "--length", 8192, "tokens per row")
    add_option(parser, "--vocab-size", 128_256, "tokens of the vocabulary")
    add_option(parser, "--micro-batch", 1, "rows per read")
    add_option(parser, "--batch", 192, "rows of a step, whose order is computed at once")
    add_option(parser, "--seconds", 5.0, "time of each measurement, about")
    add_option(parser, "--gpus", 8, "GPUs of a node")
    add_option(parser, "--gpu-tokens", 6800.0, "tokens per second that one GPU takes in")
    add_option(parser, "--model", "embedded", "model folder with the tokenizer that is measured")
    add_option(parser, "--seed", 0, "random tokens and order")


def run(options: Namespace) -> Outcome:
    """Write a store of random tokens, read it in training order, tokenise some text.

    Raises:
        InputError: a store too small for one row of each source.
    """
    torch.set_num_threads(1)
    # Before the tokenizer library starts its threads.
    os.environ["RAYON_NUM_THREADS"] = "1"
    folder = options.workdir / "data-store"
    shutil.rmtree(folder, ignore_errors=True)
    print(f"writing {folder}", flush=True)
    store = write_random_store(
        folder, options.store_gb, options.length, options.vocab_size, options.seed
    )
    order = store.order(options.seed)
    figures: dict[str, Any] = {
        "store_bytes": sum(s.num_bytes for source in store.sources for s in source.shards),
        "num_rows": len(store),
        "needed_tokens_per_s": options.gpus * options.gpu_tokens,
        "order_us_per_step": 1e6 * _order_s(order, options.batch, options.seconds / 5),
    }
    for name in ("cold", "cached"):
        print(f"reading, {name}", flush=True)
        if name == "cold":
            _drop_pages(folder)
        else:
            _read_everything(folder)
        num_rows, seconds = _read(store, order, options)
        figures[name] = {
            "num_rows": num_rows,
            "seconds": seconds,
            "rows_per_s": num_rows / seconds,
            "tokens_per_s": num_rows * options.length / seconds,
        }
    print("tokenising", flush=True)
    figures["tokenising"] = _tokenise(folder, options)
    shutil.rmtree(folder)
    names = ("store_gb", "length", "vocab_size", "micro_batch", "batch", "seconds", "gpus",
             "gpu_tokens", "seed")  # fmt: skip
    return summarise(figures, {**settings_of(options, *names), "model": Path(options.model).name})


def write_random_store(
    folder: Path, store_gb: float, length: int, vocab_size: int, seed: int
) -> TokenStore:
    """A store of three sources of random tokens, with documents of 1000 tokens on average.

    Raises:
        InputError: too small for one row of each source.
    """
    dtype = ID_TYPES[id_type(vocab_size)][1]
    row_bytes = length * dtype.itemsize + -(-length // 8)
    counts = largest_remainder(_SHARES, int(store_gb * 1e9) // row_bytes)
    if 0 in counts:
        raise InputError(
            f"--store-gb {store_gb:g}: room for {sum(counts)} rows of {length} tokens, too few for "
            f"{len(counts)} sources; ask for more"
        )
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    sources = []
    for number, (share, count) in enumerate(zip(_SHARES, counts, strict=True)):
        shards = []
        for index, first in enumerate(range(0, count, _SHARD_ROWS)):
            shape = (min(_SHARD_ROWS, count - first), length)
            ids_NT = generator.integers(0, vocab_size, shape, dtype=dtype.type)
            is_start = generator.random(shape, dtype=np.float32) < 1 / _MEAN_DOCUMENT_TOKENS
            starts_NB = np.packbits(is_start, axis=1, bitorder="little")
            path = folder / shard_name(number, index)
            tensors = {"ids": torch.from_numpy(ids_NT), "starts": torch.from_numpy(starts_NB)}
            write_tensors(path, tensors, {"format": FORMAT})
            shards.append(
                Shard(
                    path.name, shape[0], ids_NT.size, int(is_start.sum()), 0,
                    path.stat().st_size, file_sha256(path),
                )
            )  # fmt: skip
        sources.append(StoreSource(f"random {number}", share, "0" * 64, tuple(shards)))
    tokenizer: Any = _AnyTokenizer(vocab_size)
    write_manifest(folder, tokenizer, length, sources, {})
    return TokenStore.open(folder)


def _order_s(order: TrainingOrder, batch: int, limit_s: float) -> float:
    """Seconds to compute which rows a step has."""
    order.batch(0, batch)
    started_s, step = time.perf_counter(), 0
    while time.perf_counter() - started_s < limit_s:
        step += 1
        order.batch(step, batch)
    return (time.perf_counter() - started_s) / step


def _read(store: TokenStore, order: TrainingOrder, options: Namespace) -> tuple[int, float]:
    """Rows read and seconds taken, the order's computation included; at most one pass."""
    num_rows = step = 0
    started_s = time.perf_counter()
    # The sources' shares of the slots are their shares of the rows: all end at about one time.
    while num_rows + options.batch <= len(store):
        rows = order.batch(step, options.batch)
        for part in rows.split(options.micro_batch):
            store.rows(part)
        num_rows += len(rows)
        step += 1
        if time.perf_counter() - started_s > options.seconds:
            break
    if num_rows == 0:
        raise InputError(f"--batch {options.batch}: more than the {len(store)} rows of the store")
    return num_rows, time.perf_counter() - started_s


def _each_file(folder: Path, act: Callable[[int], None]) -> None:
    for path in sorted(folder.glob("*.safetensors")):
        handle = os.open(path, os.O_RDONLY)
        try:
            act(handle)
        finally:
            os.close(handle)


def _drop_pages(folder: Path) -> None:
    _each_file(folder, lambda handle: os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED))


def _read_everything(folder: Path) -> None:
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while file.read(2**24):
                pass


def _tokenise(folder: Path, options: Namespace) -> dict[str, Any]:
    """Tokens per second of making shards out of text, one thread."""
    tokenizer = load_tokenizer(options.model)
    documents = [text for text in stdlib_documents(False) if text]
    write_shard(folder, "warm-up.safetensors", documents[:20], tokenizer, 256)
    num_tokens = num_bytes = 0
    started_s, at = time.perf_counter(), 0
    while time.perf_counter() - started_s < options.seconds:
        part = [documents[i % len(documents)] for i in range(at, at + 50)]
        shard = write_shard(folder, "text.safetensors", part, tokenizer, 256)
        num_tokens += shard.num_tokens + shard.num_dropped_tokens
        num_bytes += sum(len(text.encode("utf-8", "replace")) for text in part)
        at += 50
    seconds = time.perf_counter() - started_s
    return {
        "seconds": seconds,
        "tokens_per_s": num_tokens / seconds,
        "bytes_per_s": num_bytes / seconds,
    }


def summarise(figures: dict[str, Any], settings: dict[str, Any]) -> Outcome:
    """Table and targets: reading, cached or not, has to be ten times as fast as the need."""
    needed = figures["needed_tokens_per_s"]
    rows = [("needed by a node", "", f"{needed:,.0f}", "1.0")]
    targets = []
    for name in ("cached", "cold"):
        found = figures[name]
        found["ratio"] = found["tokens_per_s"] / needed
        rows.append(
            (
                f"read, {name}", f"{found['rows_per_s']:,.0f}", f"{found['tokens_per_s']:,.0f}",
                f"{found['ratio']:,.1f}",
            )
        )  # fmt: skip
        targets.append(Target.at_least(f"{name}, of the need", _TARGET_RATIO, found["ratio"]))
    table = Table(("", "rows/s", "tokens/s", "of the need"), rows)
    text = figures["tokenising"]
    other = Table(
        ("", "measured"),
        [
            ("store", gigabytes(figures["store_bytes"])),
            ("order of one step", f"{figures['order_us_per_step']:.0f} us"),
            ("tokenising, one core", f"{text['tokens_per_s']:,.0f} tokens/s"),
            ("", f"{text['bytes_per_s'] / 1e6:.2f} MB/s of text"),
        ],
    )
    return Outcome("cpu", 1, settings, figures, [table, other], targets, list(_NOTES))
