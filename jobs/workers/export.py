"""On one worker: the exported folders with their model cards."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cluster.runtime.worker import WorkerContext
from jobs.runs.folder import disk_errors
from sparsify.formats.basis import carry_rotation
from sparsify.formats.packed_folder import load_any, save_packed_folder
from sparsify.formats.sparse_folder import (
    MASKS,
    PACKED,
    described,
    model_name,
    read_sparsity,
    write_sparsity,
)
from sparsify.formats.verify import check_files, masks_of
from sparsify.masks.storage import save_masks
from sparsify.models.load import load_pair
from sparsify.models.save import save_model


def export_on_worker(context: WorkerContext, payload: dict[str, Any]) -> dict[str, Any]:
    """One task: write, read back, check."""
    torch.set_num_threads(context.num_threads)
    config, source, folder = payload["config"], payload["source"], payload["folder"]
    dtype = config.export.dtype or _stored_dtype(source)
    model, tokenizer = load_pair(source, dtype)
    masks, pattern = masks_of(source, model, config.prune.pattern, config.prune.skip)
    before = read_sparsity(source) or {}
    method = before.get("method", "given")
    provenance = _public(before.get("provenance", {}), payload["dense"])
    sparse, packed = folder / "sparse", folder / "sparse-packed"
    bits = {"sparse": None, "sparse-packed": None}
    with disk_errors(folder):
        save_model(model, tokenizer, sparse)
        save_masks(sparse / MASKS, masks)
        carry_rotation(source, sparse)
        write_sparsity(sparse, masks, str(pattern), method, provenance)
        save_packed_folder(packed, model, tokenizer, masks, pattern, None, sparse)
        if payload["packed"] is not None:
            integers = f"int{payload['bits']}-packed"
            bits[integers] = payload["bits"]
            shutil.copytree(payload["packed"], folder / integers)
            write_sparsity(folder / integers, masks, str(pattern), method, provenance)
        for kind in bits:
            card = model_card(
                kind, bits[kind], model_name(payload["dense"]), payload["results"], str(pattern),
                provenance, described(read_sparsity(folder / kind) or {}),
            )  # fmt: skip
            (folder / kind / "README.md").write_text(card, encoding="utf-8")
    gate = {"sparse": check_files(sparse, masks, pattern)}
    reloaded = AutoModelForCausalLM.from_pretrained(sparse, dtype="auto", local_files_only=True)
    unpacked = load_any(packed, dtype, "cpu")
    for weight, other, third in zip(
        model.parameters(), reloaded.parameters(), unpacked.parameters(), strict=True
    ):
        assert torch.equal(weight, other), "the exported folder loads as what was exported"
        assert torch.equal(weight, third), "the packed file unpacks to what was packed"
    packed_bytes = {payload["name"]: (packed / PACKED).stat().st_size}
    return {"gate": gate, "packed_bytes": packed_bytes, "dtype": dtype}


def _stored_dtype(folder: Path) -> str:
    """Type of the weights in a model folder."""
    dtype = AutoConfig.from_pretrained(folder, local_files_only=True).dtype
    return str(dtype or "float32").removeprefix("torch.")


def _public(provenance: dict[str, Any], dense: Path) -> dict[str, Any]:
    """Provenance without paths of this machine: the dense model goes by name and hash."""
    kept = {key: value for key, value in provenance.items() if key != "dense_path"}
    return {"dense_model": model_name(dense), **kept}


def model_card(
    kind: str, bits: int | None, dense: str, results: list[dict[str, Any]], pattern: str,
    provenance: dict[str, Any], zeros: str | None = None,
) -> str:  # fmt: skip
    """A model card: what it is, how it was made, how good it is, how to load it.

    Args:
        kind: the folder's name; `sparse` is stored dense, the others packed.
        bits: of its integers; None for a model that is not quantised.
        dense: name of the dense model.
        results: rows of the summary.
        pattern: of the zeros.
        provenance: for the list at the end.
        zeros: a sentence on how much of the model they are.
    """
    what = f"{pattern} sparse weights, stored dense with zeros; loads like any other model."
    if bits is not None:
        what = f"{pattern} sparse weights in INT{bits}, only the kept values."
    elif kind != "sparse":
        what = f"{pattern} sparse weights, only the kept values and their positions."
    if zeros is not None:
        what = f"{what} {zeros}"
    load = (
        f"from transformers import AutoModelForCausalLM\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{kind}")'
        if kind == "sparse"
        else "from sparsify.formats.packed24 import load_packed\n\n"
        f'state_dict = load_packed("{kind}/model.packed.safetensors")  # dense tensors'
    )
    lines = [
        "---", "library_name: transformers", f'tags: [sparse, "{pattern}", twofour]', "---",
        f"# {dense}, {pattern} sparse", "", what, "",
        "| model | perplexity | KL to dense |", "|---|---|---|",
    ]  # fmt: skip
    for row in results:
        kl = "" if row["kl"] is None else f"{row['kl']:.4f}"
        lines.append(f"| {row['label']} | {row['perplexity']:.4g} | {kl} |")
    facts = [f"- {key}: {value}" for key, value in provenance.items()]
    lines += [
        "", "Perplexity on held-out text of the run that made it; compare only within this table.",
        "", "```python", load, "```", "", "Provenance:", "", *facts,
        "- sparsity.json lists pattern, mask hash and kept weights of every layer.", "",
    ]  # fmt: skip
    return "\n".join(lines)
