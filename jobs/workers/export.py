"""On one worker: the exported folders with their model cards."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.runtime.backend import WorkerContext


def export_on_worker(context: WorkerContext, payload: dict[str, Any]) -> dict[str, Any]:
    """One task: write, read back, check."""
    import shutil

    import torch
    from transformers import AutoModelForCausalLM

    from jobs.runs.folder import disk_errors
    from sparsify.formats.basis import carry_rotation
    from sparsify.formats.packed_folder import load_any, save_packed_folder
    from sparsify.formats.sparse_folder import MASKS, PACKED, read_sparsity, write_sparsity
    from sparsify.formats.verify import check_files, masks_of
    from sparsify.masks.storage import save_masks
    from sparsify.models.load import load_pair, save_model

    torch.set_num_threads(context.num_threads)
    config, models, folder = payload["config"], payload["models"], payload["folder"]
    source = models.sparse("export")
    dtype = config.export.dtype or _stored_dtype(source)
    model, tokenizer = load_pair(source, dtype)
    masks, pattern = masks_of(source, model, config.prune.pattern, config.prune.skip)
    before = read_sparsity(source) or {}
    name = "recovered" if models.recovered is not None else str(models.method)
    with disk_errors(folder):
        sparse = folder / "sparse"
        save_model(model, tokenizer, sparse)
        save_masks(sparse / MASKS, masks)
        carry_rotation(source, sparse)
        provenance = _public(before.get("provenance", {}), models.dense)
        write_sparsity(sparse, masks, str(pattern), before.get("method", "given"), provenance)
        save_packed_folder(folder / "sparse-packed", model, tokenizer, masks, pattern, None, sparse)
        if models.packed_int4 is not None:
            shutil.copytree(models.packed_int4, folder / "int4-packed")
            write_sparsity(
                folder / "int4-packed", masks, str(pattern), before.get("method", "given"),
                provenance,
            )  # fmt: skip
        for path in folder.iterdir():
            card = _card(path.name, models, payload["results"], str(pattern), provenance)
            (path / "README.md").write_text(card, encoding="utf-8")
    gate = {"sparse": check_files(sparse, masks, pattern)}
    reloaded = AutoModelForCausalLM.from_pretrained(sparse, dtype="auto", local_files_only=True)
    unpacked = load_any(folder / "sparse-packed", dtype, "cpu")
    for weight, other, third in zip(
        model.parameters(), reloaded.parameters(), unpacked.parameters(), strict=True
    ):
        assert torch.equal(weight, other), "the exported folder loads as what was exported"
        assert torch.equal(weight, third), "the packed file unpacks to what was packed"
    packed_bytes = {name: (folder / "sparse-packed" / PACKED).stat().st_size}
    return {"gate": gate, "packed_bytes": packed_bytes, "dtype": dtype}


def _stored_dtype(folder: Path) -> str:
    """Type of the weights in a model folder."""
    from transformers import AutoConfig

    dtype = AutoConfig.from_pretrained(folder, local_files_only=True).dtype
    return str(dtype or "float32").removeprefix("torch.")


def _public(provenance: dict[str, Any], dense: Path) -> dict[str, Any]:
    """Provenance without paths of this machine: the dense model goes by name and hash."""
    kept = {key: value for key, value in provenance.items() if key != "dense_path"}
    return {"dense_model": dense.name, **kept}


def _card(
    kind: str, models: Any, results: list[dict[str, Any]], pattern: str, provenance: dict[str, Any]
) -> str:
    """A model card: what it is, how it was made, how good it is, how to load it."""
    what = {
        "sparse": f"{pattern} sparse weights, stored dense with zeros; loads like any other model.",
        "sparse-packed": f"{pattern} sparse weights, only the kept values and their positions.",
        "int4-packed": f"{pattern} sparse weights in INT4, only the kept values.",
    }[kind]
    load = (
        f"from transformers import AutoModelForCausalLM\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{kind}")'
        if kind == "sparse"
        else "from sparsify.formats.packed24 import load_packed\n\n"
        f'state_dict = load_packed("{kind}/model.packed.safetensors")  # dense tensors'
    )
    lines = [
        "---", "library_name: transformers", "tags: [sparse, 2:4, twofour]", "---",
        f"# {models.dense.name}, {pattern} sparse", "", what, "",
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
