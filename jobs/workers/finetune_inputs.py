"""What a fine-tuning is given, looked at before anything is started: records, template, models."""

from __future__ import annotations

import hashlib
from copy import copy
from dataclasses import replace
from fnmatch import fnmatchcase
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from conf.schema import Config
from jobs.corpus.builtin import BUILT_IN
from jobs.corpus.chats import TEXT, Chats, check_fields
from jobs.corpus.places import absolute_name
from jobs.corpus.survey import source_fingerprint
from jobs.corpus.templates import BUILT_IN as TEMPLATES
from jobs.corpus.templates import Renderer, template_of
from jobs.planning import preflight
from jobs.planning.models import shape_of
from jobs.runs.hub import model_folder
from jobs.training.inputs import checked_store, given_digests
from jobs.workers.checks import check_same_words, shapes_of
from sparsify.costs.deploy import AdapterTraining, adapter_memory
from sparsify.errors import InputError
from sparsify.formats.sparse_folder import model_fingerprint
from sparsify.models.lm_head import find_head
from sparsify.models.load import check_checkpoint, load_tokenizer
from sparsify.models.structure import find_blocks, linears_of

_NUM_TRIED = 100  # records that are rendered before the start


def absolute_source(name: str | None) -> str | None:
    """A source's name from the root: workers may run elsewhere."""
    return None if name is None else absolute_name(name, BUILT_IN)


def absolute_template(given: str | None) -> str | None:
    """A template's file from the root."""
    if given is None or given in TEMPLATES:
        return given
    return str(Path(given).expanduser().absolute())


def source_of(config: Config) -> str:
    """What is trained on; InputError where nobody says."""
    source = config.finetune.data or config.data.train
    if source is None:
        raise InputError(
            "finetune.data: is required; give records (messages, prompt and completion, Alpaca, "
            "ShareGPT) or text, for example finetune.data=records.jsonl"
        )
    return source


def form_of(config: Config) -> str:
    """The form of the records, or that they are text.

    Raises:
        InputError: see `Chats.form`.
    """
    return _chats(config, source_of(config)).form()


def _chats(config: Config, source: str) -> Chats:
    check_fields(config.finetune.fields)
    return Chats(source, config.finetune.fields, config.data.text_field)


def input_digests(config: Config, student: Path) -> dict[str, Any]:
    """For identities: the conversations or text, the template, and what is held out."""
    form, given = form_of(config), config.finetune.adapter_from
    adapters = {} if given is None else {"adapter": model_fingerprint(Path(given))}
    if form == TEXT:
        own = as_text(config)
        found: dict[str, Any] = {**given_digests(own), **adapters}
        if "train" not in found:
            found["train"] = source_fingerprint(own.data, "train")
        if config.data.heldout is not None:
            found["heldout"] = source_fingerprint(config.data, "heldout")
        return found
    template = template_of(load_tokenizer(student), config.finetune.template)
    return {
        **adapters,
        "form": form,
        "records": _chats(config, source_of(config)).digest()[0],
        "template": hashlib.sha256(template.encode()).hexdigest(),
    }


def as_text(config: Config) -> Config:
    """The config whose training text is what is fine-tuned on, in `data.train`."""
    own = copy(config)
    own.data = replace(config.data, train=source_of(config))
    return own


def check_finetune(config: Config, dense: Path) -> None:
    """Hold what a fine-tuning is given against the models, the template and each other.

    Every record is read, the first hundred are rendered.

    Raises:
        InputError: no known form, or two; a template that is missing or cannot render; options that
            the form has no use for; a teacher of another vocabulary or shape; or see
            `preflight.check_recovery`.
    """
    settings = config.finetune
    _check_packages(settings.adapter)
    form = form_of(config)
    find_head(shapes_of(dense))
    if form == TEXT:
        _check_text(config)
        checked_store(as_text(config), dense)
    else:
        _check_records(config, dense)
    if settings.teacher is not None:
        _check_teacher(config, dense)
    if settings.adapter_from is not None and not Path(settings.adapter_from).is_dir():
        raise InputError(f"finetune.adapter_from={settings.adapter_from}: there is no such folder")
    own = copy(config)
    own.distill = settings.training(settings.num_tokens or 1)
    preflight.check_recovery(own, dense, has_teacher=settings.teacher is not None)


def _check_packages(adapter: str) -> None:
    needed = {"none": (), "lora": ("peft",), "qlora": ("peft", "bitsandbytes")}[adapter]
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise InputError(
            f"finetune.adapter={adapter}: needs {' and '.join(missing)}, not installed here; run "
            'pip install "twofour[finetune]"'
        )


def _check_text(config: Config) -> None:
    settings, source = config.finetune, source_of(config)
    if settings.num_tokens is None:
        raise InputError(
            f"finetune.num_tokens: is required because {source} is text, which is read as far as "
            "it is needed; give the tokens to train on"
        )
    for name in ("fields", "template", "heldout"):
        if getattr(settings, name):
            raise InputError(
                f"finetune.{name}={getattr(settings, name)}: is for records, and {source} is text; "
                "leave it out"
            )


def _check_records(config: Config, dense: Path) -> None:
    settings = config.finetune
    if settings.heldout_every_steps is not None and settings.heldout is None:
        raise InputError(
            f"finetune.heldout_every_steps={settings.heldout_every_steps}: there are no records to "
            "score; give some with finetune.heldout=FILE, or leave it out"
        )
    if settings.heldout is not None and settings.heldout_every_steps is None:
        raise InputError(
            f"finetune.heldout={settings.heldout}: is never scored; say how often with "
            "finetune.heldout_every_steps"
        )
    tokenizer = load_tokenizer(dense)
    renderer = Renderer(tokenizer, template_of(tokenizer, settings.template))
    for source in filter(None, (source_of(config), settings.heldout)):
        chats = _chats(config, source)
        chats.digest()  # reads all of them
        for place, turns in islice(chats, _NUM_TRIED):
            renderer.example(turns, place)


def _check_teacher(config: Config, dense: Path) -> None:
    settings = config.finetune
    folder = model_folder("finetune.teacher", str(settings.teacher), True)
    check_checkpoint(folder)
    teacher, model = shapes_of(folder), shapes_of(dense)
    check_same_words(folder, teacher, dense, model)
    sizes = [
        (one.config.get_text_config().num_hidden_layers, one.config.get_text_config().hidden_size)
        for one in (teacher, model)
    ]
    if settings.square_head_weight and sizes[0] != sizes[1]:
        raise InputError(
            f"finetune.teacher={settings.teacher}: has {sizes[0][0]} blocks of width "
            f"{sizes[0][1]}, the model {sizes[1][0]} of {sizes[1][1]}; "
            "finetune.square_head_weight compares them one by one: give a teacher of the same "
            "shape, or use finetune.kl_weight"
        )


def _adapter_bytes(config: Config) -> float:
    """Of an adapter's weight on each worker: itself, its gradient and two moments in float32. ZeRO
    splits all but the weight, and a master beside it, and holds two buffers to reduce in."""
    workers = config.cluster.num_workers
    return 16.0 if workers == 1 or config.finetune.zero_stage == 0 else 12.0 + 16.0 / workers


def memory_lines(config: Config, dense: Path) -> list[str]:
    """What QLoRA holds on each GPU, by the model's configuration alone; nothing for other ways."""
    settings = config.finetune
    if settings.adapter != "qlora":
        return []
    try:
        shape, _ = shape_of(str(dense))
    except InputError as error:
        return [f"memory: not known ({error})"]
    if shape.untraced is not None:
        return [
            f"memory: not known ({shape.name} cannot be followed without weights: {shape.untraced})"
        ]
    model = shapes_of(dense)
    list_name, blocks = find_blocks(model)
    features = sum(
        linear.in_features + linear.out_features
        for index, block in enumerate(blocks)
        for relative, linear in linears_of(block).items()
        if any(
            fnmatchcase(name, glob)
            for glob in settings.targets
            for name in (relative, f"{list_name}.{index}.{relative}")
        )
    )
    parts = adapter_memory(
        shape,
        AdapterTraining(
            rank=settings.rank, tokens=settings.micro_batch_size * config.data.sequence_length,
            num_features=features, adapter_bytes=_adapter_bytes(config),
            recompute_share=settings.recompute_share,
            recompute=settings.recompute,  # type: ignore[arg-type]
        ),
    )  # fmt: skip
    shown = ", ".join(f"{name} {size / 1e9:,.3g}" for name, size in parts.items())
    least = "finetune.recompute_share=1" if settings.recompute_share < 1 else ""
    least += " finetune.recompute=whole" if settings.recompute == "elementwise" else ""
    hint = f"; less with {least.strip()}" if least else ""
    return [f"memory: {sum(parts.values()) / 1e9:,.3g} GB on each GPU in bf16 ({shown}){hint}"]


def describe_records(config: Config, dense: Path) -> list[str]:
    """For the plan: form and number of the records, and the first as the model reads it."""
    source, form = source_of(config), form_of(config)
    if form == TEXT:
        said = f"text: {source}, {config.finetune.num_tokens:,} tokens, all of them learned"
        return [*memory_lines(config, dense), said]
    chats, tokenizer = _chats(config, source), load_tokenizer(dense)
    count = chats.digest()[1]
    template = template_of(tokenizer, config.finetune.template)
    renderer = Renderer(tokenizer, template)
    place, turns = next(iter(chats))
    example = renderer.example(turns, place)
    shown = renderer.shown(example).replace("\n", "\\n")
    lines = memory_lines(config, dense)
    lines += [f"records: {count:,} of the form {form} in {source}"]
    lines += [f"  {line}" for line in chats.remarks.lines()]
    named = config.finetune.template or "the model's own"
    lines.append(f"template: {named}, answers {renderer.how}")
    lines.append(
        f"the first, {example.num_answers} of its {len(example.ids_T)} tokens learned, between >>> "
        f"and <<<: {shown}"
    )
    return lines
