"""What goes wrong on a real Slurm: links that are cut, other users, nodes that are not ready."""

from __future__ import annotations

import json
import os
import pwd
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.slurm_rig import HOSTS, Rig
from tests.integration.slurm_runs import (
    REPOSITORY,
    SECRET,
    TWO_HOSTS,
    Submitted,
    files_of,
    rig_of_tests,
    steps_of,
    words_of,
)

pytestmark = pytest.mark.slow

# As Slurm has it where nobody sets it: Ray is the first to miss a host.
_SLURMD_TIMEOUT_S = 300

# Ray gives a machine up after half a minute instead of more than one.
SOONER = {"RAY_health_check_failure_threshold": "2"}


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with rig_of_tests(tmp_path_factory.getbasetemp(), _SLURMD_TIMEOUT_S) as started:
        yield started


@pytest.fixture(autouse=True)
def both_hosts_free(rig: Rig) -> Iterator[None]:
    """What a test that failed has left does not keep the next one waiting."""
    yield
    for host in HOSTS:
        rig.cut(host, False)
    rig.slurm("scancel", "--user=root")
    # Hosts that Slurm gave up are asked again only minutes later, unless it reads its file anew.
    rig.slurmd_timeout(_SLURMD_TIMEOUT_S)
    rig.wait_for("both hosts to be idle", rig.is_idle, 120)


@pytest.fixture(scope="module")
def deep_model(tiny_tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of many small blocks, so that there is a middle of pruning."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=64, intermediate_size=128,
        num_hidden_layers=24, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, bos_token_id=None, tie_word_embeddings=False,
        eos_token_id=tiny_tokenizer.eos_token_id,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "deep-llama"
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def step_of(run: Submitted) -> int:
    """The last step of recovery that was recorded."""
    path = run.run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line)["step"] or 0 for line in lines if "distill/" in line), default=0)


def blocks_of(run: Submitted) -> int:
    """Files of finished blocks that pruning keeps to continue from."""
    return len(list(run.run_dir.glob(".prune.partial/scratch/*/*.safetensors")))


def left_on(rig: Rig, run: Submitted) -> list[str]:
    """Processes of a job, and its scratch folders, that are still on the hosts."""
    name = f"twofour-{run.record['id']}-"
    found = []
    for host in HOSTS:
        look = (
            f"ps axww -o args | grep -F -e {name} -e '{run.run_dir}' | grep -v grep; "
            f"ls -d /tmp/{name}*"
        )
        done = subprocess.run(rig.on(host, "sh", "-c", look), capture_output=True, text=True)
        found += done.stdout.splitlines()
    return found


def nothing_left(rig: Rig, run: Submitted) -> None:
    try:
        rig.wait_for("the job's processes to end", lambda: not left_on(rig, run), 60)
    except TimeoutError:
        pytest.fail(f"left of the job: {left_on(rig, run)}")
    assert not (run.run_dir / ".cluster" / "token").exists()


def errors_in(run: Submitted) -> list[str]:
    """Lines of a job's log that say error, but for Slurm's own on what it ended therefore."""
    return [
        line
        for line in run.log.splitlines()
        if "error: " in line and not line.startswith(("srun:", "slurmstepd"))
    ]


def test_cut_links_lose_and_repeat_nothing(
    rig: Rig, deep_model: Path, text_file: Path, tmp_path: Path
) -> None:
    """One run whose links are cut: in mid-prune that of a worker's host until Ray gives it up, in
    mid-distill that of the driver's host for seconds, and then until Slurm gives it up."""
    words = [
        *words_of(deep_model, text_file), "prune.num_samples=64", "distill.num_tokens=204800",
        "distill.checkpoint_every_steps=20",
    ]  # fmt: skip
    rig.environment |= SOONER
    run = Submitted(rig, tmp_path / "cut", [*words, *TWO_HOSTS])

    run.wait_for("blocks", lambda: blocks_of(run) >= 2)
    rig.cut("tfn1")
    run.wait_for("the loss to be noticed", lambda: "so Ray has given it up" in run.log, 240)
    rig.cut("tfn1", False)
    assert "prune: tfn1 (10.77.0.11): no answer, so Ray has given it up; waiting 240 s" in run.log
    run.wait_for("the host", lambda: "is there again; the work goes on" in run.log, 240)

    run.wait_for("steps", lambda: step_of(run) >= 10)
    before = run.log.count("warning:")
    rig.cut("tfn0")
    time.sleep(4)
    rig.cut("tfn0", False)
    step = step_of(run)
    run.wait_for("steps after a short cut", lambda: step_of(run) >= step + 30)
    assert run.log.count("warning:") == before

    rig.slurmd_timeout(20)
    rig.cut("tfn0")
    run.wait_for("Slurm to notice", lambda: run.state() == "PENDING", 240)
    assert "waiting" in run.manage("status")
    rig.cut("tfn0", False)
    rig.slurmd_timeout(_SLURMD_TIMEOUT_S)
    rig.wait_for("the host in Slurm", rig.is_idle, 120)
    rig.slurm("scontrol", "update", f"JobId={run.record['id']}", "StartTime=now+15")
    run.wait_for("its second start", lambda: "attempt 2" in run.log)
    run.wait_for_end()
    assert run.state() == "COMPLETED", run.log
    continued = re.findall(r"continues after step (\d+) of 400", run.log)
    assert len(continued) == 1
    assert int(continued[0]) >= 20
    assert steps_of(run.run_dir) == list(range(1, 401))
    nothing_left(rig, run)

    undisturbed = subprocess.run(
        [sys.executable, "-m", "jobs.prune", *words, f"run.dir={tmp_path}/undisturbed"],
        cwd=REPOSITORY, env=rig.environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert undisturbed.returncode == 0, undisturbed.stderr
    assert files_of(run.run_dir) == files_of(tmp_path / "undisturbed")


def test_host_that_never_comes_back(
    rig: Rig, deep_model: Path, text_file: Path, tmp_path: Path
) -> None:
    """The run ends by itself, names the host and goes back into the queue."""
    rig.environment |= SOONER
    run = Submitted(
        rig, tmp_path / "lost",
        [*words_of(deep_model, text_file), "stages=[prune]", "prune.num_samples=64",
         "cluster.start_timeout_s=120", *TWO_HOSTS],
    )  # fmt: skip
    run.wait_for("blocks", lambda: blocks_of(run) >= 2)
    rig.slurmd_timeout(1200)  # a host that is away for longer than usual is missed by Ray alone
    rig.cut("tfn1")
    try:
        run.wait_for("the queue", lambda: "goes back into the queue" in run.log, 400)
        (said,) = errors_in(run)
        assert re.search(
            r"tfn1 \(10\.77\.0\.11\): lost, and not back within 120 s "
            r"\(cluster\.start_timeout_s\); of 4 CPU, 0 GPU Ray has 2 CPU, 0 GPU left; .*"
            "run the same command again", said,
        ), run.log  # fmt: skip
        assert "waiting" in run.manage("status") or "running" in run.manage("status")
    finally:
        rig.cut("tfn1", False)
    assert "cancel" in run.manage("cancel", "--now")
    rig.wait_for("both hosts to be idle", rig.is_idle, 120)
    nothing_left(rig, run)


NOT_READY = {
    "another token": (
        """if [ "$(hostname)" = tfn1 ] && [ "${1-}" = node ]; then
    echo 00112233445566778899aabbccddeeff >/tmp/another
    mount --bind /tmp/another "$folder/token"
fi""",
        "tfn1: Ray at .* cannot be started or joined: .*token is missing or incorrect",
    ),
    "no token": (
        """if [ "$(hostname)" = tfn1 ] && [ "${1-}" = node ]; then
    mount --bind /dev/null "$folder/token"
fi""",
        "tfn1: .*/token, the token of the job's Ray, is empty or cannot be read",
    ),
    "a port that is taken after it was chosen": (
        """if [ "$(hostname)" = tfn0 ] && [ "${1-}" = node ]; then
    python3 -c 'import socket, sys, time
with socket.create_server(("", int(sys.argv[1]))): time.sleep(600)' "${RAY_ADDRESS##*:}" &
    sleep 2
fi""",
        r"tfn0: the port of 10\.77\.0\.10:\d+ was taken by another program; submit it again",
    ),
}


def test_node_that_is_not_ready_is_one_line(
    rig: Rig, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    """The job ends by itself, and long before `start_timeout_s`."""
    setup = tmp_path / "setup.sh"
    words = [*words_of(tiny_model_dir, text_file), f"cluster.slurm.setup={setup}", *TWO_HOSTS]
    run = None
    for name, (text, said) in NOT_READY.items():
        setup.write_text(f"{text}\n")
        if run is None:
            run = Submitted(rig, tmp_path / "run", words)
        else:
            assert "submitted: slurm job" in run.manage("resume")
        run.wait_until_over(200)
        assert run.state() == "FAILED", run.log
        (error,) = errors_in(run)
        assert re.search(said, error), f"{name}: {run.log}"
        nothing_left(rig, run)


def test_disk_that_is_not_shared(
    rig: Rig, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    """A run.dir that no node sees, then one that the first alone sees."""
    folder = Path(f"/tmp/twofour-not-shared-{os.getpid()}")  # each host has a /tmp of its own
    try:
        run = Submitted(rig, folder / "run", [*words_of(tiny_model_dir, text_file), *TWO_HOSTS])
        run.wait_until_over()
        assert (
            f"tfn0 could not start it: {folder}/run/.cluster must be on a disk that all nodes see"
            in run.manage("status")
        )
        see = f"mkdir {folder} && mount --bind /mnt/old/{folder.name} {folder}"
        subprocess.run(rig.on("tfn0", "sh", "-c", see), check=True)
        assert "submitted: slurm job" in run.manage("resume")
        run.wait_until_over()
        assert run.state() == "FAILED", run.log
        assert errors_in(run) == [
            f"error: preflight: tfn1: does not have {folder}/run/.cluster/job.sh; mount the shared "
            "disk on it, or choose a shared folder"
        ]
        nothing_left(rig, run)
    finally:
        subprocess.run(rig.on("tfn0", "umount", str(folder)), capture_output=True, check=False)
        shutil.rmtree(folder, ignore_errors=True)


SECOND = "daemon"
"""a user that every Linux has"""


@pytest.fixture
def second(rig: Rig) -> tuple[Path, list[str]]:
    """A folder of another user that both hosts see, and words that make a command that user's."""
    who = pwd.getpwnam(SECOND)
    folder = rig.folder / "second"
    folder.mkdir()
    os.chown(folder, who.pw_uid, who.pw_gid)
    folder.chmod(0o700)
    user = rig.as_user(SECOND, folder, REPOSITORY)
    seen = subprocess.run(
        [*user, sys.executable, "-c", "import jobs"], cwd="/", env=rig.environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if seen.returncode != 0:
        pytest.skip(f"{SECOND}, another user, cannot read the project or its Python here")
    return folder, user


def test_second_user_neither_sees_nor_disturbs_the_first(
    rig: Rig, second: tuple[Path, list[str]], tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    """On one host: somebody else's attempts at a job, then a job of theirs beside it."""
    folder, user = second
    shutil.copytree(tiny_model_dir, folder / "model")
    shutil.copy(text_file, folder / "text.txt")
    subprocess.run(["chown", "-R", SECOND, str(folder)], check=True)
    options = ["cluster.slurm.exclusive=false", 'cluster.slurm.extra=["--nodelist=tfn0"]']
    first = Submitted(
        rig, tmp_path / "first",
        [*words_of(tiny_model_dir, text_file), "distill.num_tokens=40960", *options],
    )  # fmt: skip
    first.wait_for("its work", lambda: "prune: starting" in first.log)
    number = first.record["id"]
    address = re.search(r"Ray at (\S+:\d+)", first.log)[1]
    port = re.search(r"-L 8265:localhost:(\d+)", first.log)[1]
    job_folder = first.run_dir / ".cluster"
    token = (job_folder / "token").read_text()

    words = [
        sys.executable, str(REPOSITORY / "tests" / "integration" / "hostile.py"), str(job_folder),
        f"/tmp/twofour-{number}-0", address, port, str(os.getuid()),
    ]  # fmt: skip
    done = subprocess.run(
        [*user, "sbatch", "--wait", "--nodelist=tfn0", "--ntasks=1", "--chdir=/tmp",
         f"--output={folder}/found.json", f"--error={folder}/errors", "--wrap", shlex.join(words)],
        env=rig.environment, cwd="/", capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + (folder / "errors").read_text()
    assert first.state() == "RUNNING", first.log
    shown = (folder / "found.json").read_text()
    found = json.loads(shown)
    processes = found.pop("processes")
    assert any("gcs_server" in line for line in processes["words"])  # it has looked there
    assert token not in shown
    assert SECRET not in shown
    own = "slurmstepd"  # of its own job
    killed = [line for line in processes["killed"] if not line.startswith(own)]
    assert (processes["environ"], killed) == ([], [])
    assert found.pop("shared memory") == []
    for name, answer in found.items():
        if "GCS" in name:
            assert answer.startswith("ClusterError: RAY_ADDRESS="), (name, answer)
            assert "asks for" in answer, (name, answer)
        elif "token file" in name or "scratch" in name or name == "options":
            assert answer.startswith("PermissionError"), (name, answer)
        else:
            assert answer in ("done: 401", "done: 403"), (name, answer)

    theirs = Submitted(
        rig, folder / "run",
        [*words_of(folder / "model", folder / "text.txt"), "stages=[prune]", *options], user,
    )  # fmt: skip
    assert (folder / "run" / ".cluster").stat().st_uid == pwd.getpwnam(SECOND).pw_uid
    for run in (theirs, first):
        run.wait_for_end()
        assert run.state() == "COMPLETED", run.log
        nothing_left(rig, run)
    assert steps_of(first.run_dir) == list(range(1, 81))
    assert files_of(theirs.run_dir, ["prune"]).items() <= files_of(first.run_dir).items()
