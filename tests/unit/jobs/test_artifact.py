"""Stage folders: whole or absent, reused, refused, followed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.runs import artifact as _artifact
from jobs.runs import folder
from jobs.runs.redo import RedoJournal
from sparsify.errors import InputError, TwofourError
from sparsify.formats import sparse_folder
from tests.conftest import message

IDENTITY = {"config": {"prune": {"damping": 0.01}}, "inputs": {"model": "a"}}


def make(run_dir: Path, identity: dict = IDENTITY, redo: bool = False) -> _artifact.Artifact:
    writer = _artifact.StageWriter(run_dir, "prune", identity, "command", redo)
    (writer.folder / "result.txt").write_text("made", encoding="utf-8")
    return writer.commit({"loss": 1.0}, seed=0)


def find(run_dir: Path, identity: dict, may_extend: bool = False, may_follow: bool = False):
    return _artifact.find_finished(run_dir, "prune", identity, may_extend, may_follow)


def changed(**inputs: str) -> dict:
    return {**IDENTITY, "inputs": {**IDENTITY["inputs"], **inputs}}


def test_a_finished_stage_is_found_again(tmp_path: Path) -> None:
    assert find(tmp_path, IDENTITY) is None
    made = make(tmp_path)
    found = find(tmp_path, IDENTITY)
    assert found.is_reused
    assert found.record["metrics"] == {"loss": 1.0}
    assert found.record == made.record
    assert not (tmp_path / ".prune.partial").exists()


def test_another_identity_is_refused_field_by_field(tmp_path: Path) -> None:
    make(tmp_path)
    other = {"config": {"prune": {"damping": 0.1}}, "inputs": {"model": "b"}}
    with pytest.raises(InputError) as error:
        find(tmp_path, other)
    assert "config.prune.damping: 0.01 -> 0.1" in str(error.value)
    assert "inputs.model: a -> b" in str(error.value)
    assert "run.redo=[prune]" in str(error.value)


def test_inputs_may_be_added_or_followed_but_options_not_changed(tmp_path: Path) -> None:
    make(tmp_path)
    assert find(tmp_path, changed(more="x"), may_extend=True) is None
    with pytest.raises(InputError):
        find(tmp_path, changed(model="b"), may_extend=True)
    assert find(tmp_path, changed(model="b"), may_follow=True) is None
    with pytest.raises(InputError):
        find(tmp_path, {**changed(model="b"), "config": {}}, may_follow=True)


@pytest.mark.parametrize("damage", ["missing", "shorter", "changed"])
def test_a_damaged_stage_is_refused(tmp_path: Path, damage: str) -> None:
    path = make(tmp_path).folder / "result.txt"
    if damage == "missing":
        path.unlink()
    else:
        path.write_text("mad" if damage == "shorter" else "fade", encoding="utf-8")
    with pytest.raises(InputError, match="damaged"):
        find(tmp_path, IDENTITY)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (b'{"schema": 1, "iden', "not JSON"), (b"", "not JSON"), (b"\xff\xfe", "not JSON"),
        (b"[1]", "a list and no object"), (b'{"schema": 1}', "'identity' is missing"),
        (b"{}", "schema None"),
        (b'{"schema": 1, "identity": {}, "outputs": [], "metrics": {}}', "'outputs' is no such"),
        (
            b'{"schema": 1, "identity": {}, "outputs": {"a": 1}, "metrics": {}, "duration_s": 1}',
            "nothing is said of 'a'",
        ),
    ],
)  # fmt: skip
def test_a_record_that_is_not_whole_is_one_line_with_the_way_out(
    tmp_path: Path, record: bytes, reason: str
) -> None:
    path = make(tmp_path).folder / "record.json"
    path.write_bytes(record)
    for read in (lambda: find(tmp_path, IDENTITY), lambda: _artifact.read_whole(path.parent)):
        with pytest.raises(InputError) as error:
            read()
        assert str(path) in message(error)
        assert reason in message(error)
        assert "run.redo=[prune]" in message(error)
    again = make(tmp_path, redo=True)
    assert find(tmp_path, IDENTITY).record == again.record


def test_a_stage_without_its_record_is_offered_for_redo(tmp_path: Path) -> None:
    (make(tmp_path).folder / "record.json").unlink()
    with pytest.raises(InputError, match=r"no record\.json.*run\.redo=\[prune\]"):
        find(tmp_path, IDENTITY)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"identity"'])
def test_checkpoints_of_which_nothing_is_known_are_kept(tmp_path: Path, content: bytes) -> None:
    writer = _artifact.StageWriter(tmp_path, "prune", IDENTITY, "command")
    (writer.scratch / "step-1").write_text("state", encoding="utf-8")
    (tmp_path / ".prune.partial" / "begun.json").write_bytes(content)
    with pytest.raises(InputError, match=r"begun\.json: damaged.*run\.redo=\[prune\]"):
        _artifact.StageWriter(tmp_path, "prune", IDENTITY, "command")
    redo = _artifact.StageWriter(tmp_path, "prune", IDENTITY, "command", redo=True)
    assert not (redo.scratch / "step-1").exists()


def test_a_journal_of_redos_that_is_damaged_is_one_line(tmp_path: Path) -> None:
    journal = RedoJournal(tmp_path, "command")
    assert journal.left(["all"], ["prune", "distill"]) == {"prune", "distill"}
    journal.add("prune")
    assert RedoJournal(tmp_path, "command").left(["prune", "distill"], []) == {"distill"}
    assert RedoJournal(tmp_path, "another").left(["prune"], []) == {"prune"}
    (tmp_path / ".redo.json").write_text("[")
    with pytest.raises(InputError, match=r"\.redo\.json: damaged.*remove it"):
        RedoJournal(tmp_path, "command")


def test_a_redone_stage_replaces_the_old_one_only_when_it_is_whole(tmp_path: Path) -> None:
    old = make(tmp_path)
    writer = _artifact.StageWriter(tmp_path, "prune", IDENTITY, "command", True)
    assert (old.folder / "result.txt").read_text(encoding="utf-8") == "made"
    (writer.folder / "result.txt").write_text("again", encoding="utf-8")
    writer.commit({}, seed=0)
    assert (old.folder / "result.txt").read_text(encoding="utf-8") == "again"
    assert not list(tmp_path.glob(".prune.*"))


def test_an_interrupted_stage_of_another_identity_keeps_its_checkpoints(tmp_path: Path) -> None:
    writer = _artifact.StageWriter(tmp_path, "prune", IDENTITY, "command", False)
    (writer.scratch / "step-1").write_text("state", encoding="utf-8")
    with pytest.raises(InputError, match="interrupted stage prune"):
        _artifact.StageWriter(tmp_path, "prune", changed(model="b"), "command", False)
    again = _artifact.StageWriter(tmp_path, "prune", IDENTITY, "command", False)
    assert (again.scratch / "step-1").exists()


def test_a_redo_that_was_interrupted_is_carried_on(tmp_path: Path) -> None:
    writer = _artifact.StageWriter(tmp_path, "prune", IDENTITY, "command")
    (writer.scratch / "step-1").write_text("of the first try", encoding="utf-8")
    redo = _artifact.StageWriter(tmp_path, "prune", IDENTITY, "command", redo=True)
    assert not (redo.scratch / "step-1").exists(), "a redo starts over"
    (redo.scratch / "step-2").write_text("of the redo", encoding="utf-8")
    for again in (True, False):
        later = _artifact.StageWriter(tmp_path, "prune", IDENTITY, "command", redo=again)
        assert (later.scratch / "step-2").exists()


def test_what_an_earlier_stage_replaced_is_thrown_away(tmp_path: Path) -> None:
    writer = _artifact.StageWriter(tmp_path, "prune", IDENTITY, "command")
    (writer.scratch / "step-1").write_text("state", encoding="utf-8")
    kept = _artifact.StageWriter(tmp_path, "prune", IDENTITY, "command", other="replace")
    assert (kept.scratch / "step-1").exists(), "the same identity goes on"
    other = _artifact.StageWriter(tmp_path, "prune", changed(model="b"), "command", other="replace")
    assert not (other.scratch / "step-1").exists()


def test_what_lies_under_what_decided_it_is_kept_whatever_is_asked(tmp_path: Path) -> None:
    def begin(identity: dict, redo: bool = False) -> Path:
        return _artifact.StageWriter(
            tmp_path, "prune", identity, "command", redo, other="keep"
        ).scratch  # fmt: skip

    (begin(IDENTITY) / "one").write_text("result", encoding="utf-8")
    assert (begin(changed(more="x")) / "one").exists()
    assert not (begin(IDENTITY, redo=True) / "one").exists(), "a redo starts over"
    (begin(IDENTITY, redo=True) / "two").write_text("result", encoding="utf-8")
    assert (begin(changed(more="x"), redo=True) / "two").exists(), "and is carried on"
    (tmp_path / ".prune.partial" / "begun.json").write_bytes(b"")
    assert (begin(IDENTITY) / "two").exists(), "nothing has to be known of it"


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    with (
        folder.run_lock(tmp_path),
        pytest.raises(InputError, match="another run"),
        folder.run_lock(tmp_path),
    ):
        pytest.fail("the second run got the folder")


def test_a_real_full_disk_is_one_line() -> None:
    with pytest.raises(TwofourError, match="disk is full"), folder.disk_errors(Path("x")):
        Path("/dev/full").write_text("text", encoding="utf-8")


def test_json_is_the_old_or_the_new_file(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    folder.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        folder.write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": 1}


READ = (
    "config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json",
    "parts/last.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model",
    "spiece.model", "qwen.tiktoken", "chat_template.jinja", "additional_chat_templates/rag.jinja",
    "sparsity.json", "sparsity/masks.safetensors", "sparsity/rotation.safetensors",
)  # fmt: skip
DESCRIBES = (
    "README.md",
    "LICENSE.txt",
    "pytorch_model.bin",
    ".cache/x.json",
    "other/x.safetensors",
)


def test_model_fingerprint_follows_every_file_that_is_read_and_no_other(tmp_path: Path) -> None:
    for name in (*READ, *DESCRIBES):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name, encoding="utf-8")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "parts/last.safetensors"}}', encoding="utf-8")
    before = sparse_folder.model_fingerprint(tmp_path)
    seen = {before}
    for name in DESCRIBES:
        (tmp_path / name).write_text("other", encoding="utf-8")
        assert sparse_folder.model_fingerprint(tmp_path) == before, name
    for name in READ:
        path = tmp_path / name
        was = path.read_bytes()
        path.write_bytes(was + b" ")
        seen.add(sparse_folder.model_fingerprint(tmp_path))
        path.unlink()
        seen.add(sparse_folder.model_fingerprint(tmp_path))
        path.write_bytes(was)
    assert len(seen) == 1 + 2 * len(READ)
    assert sparse_folder.model_fingerprint(tmp_path) == before
    index.write_text("{", encoding="utf-8")
    assert sparse_folder.model_fingerprint(tmp_path) != before
