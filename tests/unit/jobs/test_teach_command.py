"""Sampling a teacher for a store: what is drawn, going on after a kill, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from conf.options.data import DataConfig
from conf.options.distill import DistillConfig
from conf.options.model import ModelConfig
from conf.options.teach import TeachConfig, TeachJobConfig
from conf.schema import Config
from jobs.pipeline import PIPELINE
from jobs.runs.artifact import differences
from jobs.runs.context import StageContext
from jobs.runs.models import Models
from jobs.stages import distill
from jobs.training.inputs import check_cache, check_words
from jobs.workers import teach as _teach
from jobs.workers.distill import verify_file
from sparsify.data.rows import TokenRows
from sparsify.data.store import TokenStore
from sparsify.data.store_write import write_rows
from sparsify.data.teacher_samples import TeacherSamples
from sparsify.distillation.head_loss import Teacher
from sparsify.errors import InputError
from sparsify.models.lm_head import check_head
from sparsify.models.load import load_model, load_tokenizer
from tests.conftest import message
from tests.unit.jobs.test_tokenize_command import Told

LENGTH, NUM_SAMPLES = 16, 8
CONTEXT: Any = SimpleNamespace(num_threads=1, device="cpu")


def in_process(work: Callable[..., Any], payloads: list[Any]) -> None:
    for payload in payloads:
        work(CONTEXT, payload)


def write_store(folder: Path, model: Path, seed: int = 0) -> Path:
    """Three sources of packed rows, one shard each."""
    tokenizer = load_tokenizer(model)
    generator = torch.Generator().manual_seed(seed)
    rows_of = {}
    for name, num_rows in (("a", 5), ("b", 1), ("c", 12)):
        ids_NT = torch.randint(len(tokenizer), (num_rows, LENGTH), generator=generator)
        rows = TokenRows.whole(ids_NT)
        rows.positions_NT[:, 9:] -= 9
        rows_of[name] = rows
    write_rows(folder, rows_of, tokenizer, LENGTH)
    return folder


@pytest.fixture
def job(tiny_model_dir: Path, tmp_path: Path) -> TeachJobConfig:
    store = write_store(tmp_path / "tokens", tiny_model_dir)
    return TeachJobConfig(
        model=ModelConfig(path=str(tiny_model_dir)),
        data=DataConfig(train=str(store)),
        teach=TeachConfig(out=str(tmp_path / "out"), num_samples=NUM_SAMPLES, batch_size=4),
    )


def write(job: TeachJobConfig, folder: Path, map_shards: Any = in_process) -> list[str]:
    folder.mkdir(exist_ok=True)
    told: Any = Told()
    _teach.write_cache(job, folder, map_shards, told)
    return told.lines


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def with_teach(job: TeachJobConfig, **settings: Any) -> TeachJobConfig:
    return replace(job, teach=replace(job.teach, **settings))


# --- what is drawn


@pytest.mark.parametrize("isolates", [True, False])
def test_samples_are_of_the_teachers_predictions_at_the_same_rows(job, tmp_path, isolates) -> None:
    many = with_teach(job, num_samples=5_000, temperature=0.1, flatness=1.3)
    many = replace(many, data=replace(job.data, isolate_documents=isolates))
    write(many, tmp_path / "cache")
    cache, store = TeacherSamples.open(tmp_path / "cache"), TokenStore.open(job.data.train)
    assert len(cache) == len(store) == 18
    assert (cache.facts.isolate_documents, cache.facts.temperature) == (isolates, 0.1)
    model = load_model(job.model.path)
    for numbers in ([17, 5], [6]):
        rows, sample = store.rows(numbers), cache.rows(numbers)
        rows = rows if isolates else TokenRows.whole(rows.ids_NT)
        with torch.no_grad():
            logits = model(
                input_ids=rows.ids_NT, position_ids=rows.positions_NT, use_cache=False
            ).logits
        p_NV = (logits.flatten(0, 1) / 0.1).softmax(-1)
        drawn_NV = torch.zeros_like(p_NV).scatter_add_(1, sample.ids_NK, sample.weights_NK)
        # The variance of an id's estimate is p (p / r - p) / K, with r proportional to p^(1/1.3).
        r_NV = p_NV.pow(1 / 1.3)
        ratio_NV = p_NV / r_NV * r_NV.sum(-1, keepdim=True)
        expected = float((p_NV * (ratio_NV - p_NV)).sum()) / 5_000
        # A sum over 5,120 ids and more: measured 0.93 to 0.98 of its mean.
        missed = float((drawn_NV - p_NV).square().sum())
        assert missed == pytest.approx(expected, rel=0.15)
        assert (drawn_NV - p_NV.roll(1, 0)).square().sum() > 20 * expected
        entropy_N = torch.distributions.Categorical(p_NV).entropy()
        assert torch.allclose(sample.entropy_N, entropy_N, rtol=1e-5)


def test_a_row_is_drawn_by_its_number_whatever_shares_its_forward(job, tmp_path) -> None:
    for size in (1, 4, 32):
        write(with_teach(job, batch_size=size), tmp_path / f"cache-{size}")
    one, four, all_ = (
        TeacherSamples.open(tmp_path / f"cache-{n}").rows(range(18)) for n in (1, 4, 32)
    )
    for other in (four, all_):
        # Rounding may move a draw that lies on an edge; measured: none of 2,304.
        assert (one.ids_NK == other.ids_NK).float().mean() > 0.999
    write(with_teach(job, seed=1), tmp_path / "other")
    other = TeacherSamples.open(tmp_path / "other").rows(range(18))
    assert (one.ids_NK == other.ids_NK).float().mean() < 0.1
    rows = one.ids_NK.view(18, -1)
    assert len(rows.unique(dim=0)) == 18


def test_half_the_memory_and_what_the_plan_says(job, tmp_path) -> None:
    half = replace(job, model=replace(job.model, dtype="bfloat16"))
    lines = write(half, tmp_path / "cache")
    cache = TeacherSamples.open(tmp_path / "cache")
    assert cache.facts.dtype == "bfloat16"
    size = "size: 68 bytes for each of 288 tokens, 1.96e-05 GB"
    assert size in lines
    assert lines[-1] == f"18 rows, 288 tokens, digest {cache.digest[:12]}"
    plan = _teach.describe_plan(half)
    assert f"  {size}" in plan
    assert "weights in bfloat16" in plan[1]
    assert "18 of 16 tokens, 3 shards" in plan[2]


# --- going on


def test_killed_at_any_file_and_started_again(job, tmp_path) -> None:
    write(job, tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    for num_whole in range(3):
        folder = tmp_path / f"killed-{num_whole}"

        def some(work: Any, payloads: list[Any], count: int = num_whole) -> None:
            in_process(work, payloads[-count:] if count else [])  # in another order
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write(job, folder, some)
        assert not (folder / "manifest.json").exists()
        (folder / ".samples-00-00000.safetensors.tmp").write_bytes(b"half")
        made: list[int] = []

        def rest(work: Any, payloads: list[Any], made: list[int] = made) -> None:
            made.extend(task.shard for task in payloads)
            in_process(work, payloads)

        write(job, folder, rest)
        assert made == list(range(3 - num_whole))
        assert contents(folder) == expected


def test_only_a_damaged_file_is_made_again(job, tmp_path) -> None:
    folder = tmp_path / "cache"
    write(job, folder)
    expected = contents(folder)
    path = folder / "samples-02-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    lines = write(job, folder)
    assert "teach: 2 shards are whole, 1 to make" in lines
    assert contents(folder) == expected


def nothing(work: Any, payloads: list[Any]) -> None:
    raise AssertionError("nothing is to be made")


def test_a_whole_cache_is_left_alone_and_another_is_refused(job, tmp_path) -> None:
    folder = tmp_path / "cache"
    write(job, folder)
    write(job, folder, nothing)
    write(with_teach(job, batch_size=2), folder, nothing)
    for change in (
        with_teach(job, seed=1), with_teach(job, num_samples=9), with_teach(job, temperature=2.0),
        with_teach(job, flatness=2.0), replace(job, model=replace(job.model, dtype="bfloat16")),
        replace(job, data=replace(job.data, isolate_documents=False)),
    ):  # fmt: skip
        with pytest.raises(
            InputError, match=f"teach.out={folder}: the teacher cache was made"
        ) as error:
            write(change, folder, nothing)
        assert message(error)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").touch()
    with pytest.raises(InputError, match="holds other files and no teacher cache"):
        write(job, tmp_path / "full", nothing)


def test_what_cannot_be_sampled_is_refused(job, tmp_path, tiny_model_dir) -> None:
    def refused(change: TeachJobConfig) -> str:
        with pytest.raises(InputError) as error:
            write(change, tmp_path / "cache", nothing)
        return message(error)

    text = replace(job, data=replace(job.data, train=str(tiny_model_dir)))
    assert "not a token store; make one of the text" in refused(text)
    assert "made with another tokenizer" in refused(replace(job, model=ModelConfig()))
    short = tmp_path / "short"
    shutil.copytree(tiny_model_dir, short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 8}))
    assert "8 positions" in refused(replace(job, model=ModelConfig(path=str(short))))
    store = next(Path(job.data.train).glob("tokens-01*"))
    store.write_bytes(store.read_bytes()[:-1] + b"\xff")
    with pytest.raises(InputError, match=r"tokens-01.*SHA-256 changed"):
        write(job, tmp_path / "cache")


# --- a recovery that is given a cache


def test_a_recovery_takes_no_cache_of_something_else(job, tmp_path, tiny_model_dir) -> None:
    folder = tmp_path / "cache"
    write(with_teach(job, temperature=2.0), folder)
    good = Config(
        distill=DistillConfig(teacher_cache=str(folder), temperature=2.0),
        data=DataConfig(train=job.data.train, sequence_length=LENGTH),
    )
    check_cache(good, tiny_model_dir)
    check_cache(Config(), tiny_model_dir)

    def refused(change: Config, teacher: Path = tiny_model_dir) -> str:
        with pytest.raises(InputError) as error:
            check_cache(change, teacher)
        return message(error)

    def with_data(**settings: Any) -> Config:
        return replace(good, data=replace(good.data, **settings))

    def with_distill(**settings: Any) -> Config:
        return replace(good, distill=replace(good.distill, **settings))

    other_store = write_store(tmp_path / "others", tiny_model_dir, seed=1)
    assert "rows of another store" in refused(with_data(train=str(other_store)))
    for train in (None, "stdlib"):
        assert "belong to the rows of a token store" in refused(with_data(train=train))
    other = tmp_path / "other"
    shutil.copytree(tiny_model_dir, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-4}))
    assert "drawn from another teacher" in refused(good, other)
    text = refused(with_distill(temperature=1.0))
    assert "drawn at temperature 2, and distill.temperature=1; use distill.temperature=2" in text
    text = refused(with_data(isolate_documents=False))
    assert "drawn with data.isolate_documents=true, and here it is false" in text
    assert "no such folder" in refused(with_distill(teacher_cache=str(tmp_path / "none")))
    for text in (refused(with_distill(temperature=1.0)), refused(good, other)):
        assert text.startswith(f"distill.teacher_cache={folder}: ")

    cache = TeacherSamples.open(folder)
    check_words(cache, load_model(tiny_model_dir))
    with pytest.raises(InputError, match="must share the vocabulary"):
        check_words(cache, load_model("embedded"))
    path = folder / cache.shards[0].file
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    verify_file(CONTEXT, (cache, 1))
    with pytest.raises(InputError, match="SHA-256 changed"):
        verify_file(CONTEXT, (cache, 0))
    path.unlink()
    assert "is missing" in refused(good)


def test_draws_do_not_need_the_whole_model(job, tmp_path) -> None:
    """What is drawn is the head's: hidden states and head give the same sample."""
    from sparsify.data.order import key_of
    from sparsify.distillation.sampling import draw

    write(job, tmp_path / "cache")
    rows = TokenStore.open(job.data.train).rows([7])
    found = check_head(load_model(job.model.path))
    with torch.no_grad():
        hidden = found.base(
            input_ids=rows.ids_NT, position_ids=rows.positions_NT, use_cache=False
        ).last_hidden_state
    generator = torch.Generator().manual_seed(key_of("teach", 0, 7))
    again = draw(Teacher(hidden[0], found.plain()), NUM_SAMPLES, generator)
    sample = TeacherSamples.open(tmp_path / "cache").rows([7])
    assert (again.ids_NK == sample.ids_NK).float().mean() > 0.99


def test_what_decides_a_recovery_is_what_the_cache_holds_not_where_it_lies(
    job, tmp_path, tiny_model_dir
) -> None:
    def identity_of(cache: Path | None) -> dict[str, Any]:
        config = Config(
            distill=DistillConfig(teacher_cache=None if cache is None else str(cache)),
            data=DataConfig(train=job.data.train, sequence_length=LENGTH),
        )
        models = Models(tiny_model_dir, PIPELINE, {"prune": {"wanda": tiny_model_dir}}, "wanda")
        nothing: Any = None
        return distill.identity(
            StageContext(config, config, tmp_path, "", models, nothing, nothing, nothing)
        )

    write(job, tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "moved")
    write(with_teach(job, seed=1), tmp_path / "other")
    one, moved, other = (identity_of(tmp_path / name) for name in ("one", "moved", "other"))
    assert one == moved
    (change,) = differences(one, other)
    assert change.startswith("inputs.teacher_cache: ")
    (change,) = differences(identity_of(None), one)
    assert change.startswith("inputs.teacher_cache: absent -> ")
