"""A real Slurm with two hosts on this machine: two network namespaces on one bridge; needs root.

    python tests/integration/slurm_rig.py [SHARED FOLDER]...

prints its SLURM_CONF and runs until Ctrl-C.

Each host is a set of namespaces of its own (network, processes, name, mounts) in which a slurmd
runs, so that Ray's processes, /tmp/ray, shared memory and addresses of one are not the other's.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

HOSTS = ("tfn0", "tfn1")
PROGRAMS = (
    "slurmctld", "slurmd", "munged", "mungekey", "sbatch", "ip", "nsenter", "unshare", "setpriv",
    "tini",
)  # fmt: skip
# Names, addresses and ports are those of every rig: whoever holds this has the machine's only one.
_LOCK = Path("/run/lock/twofour-slurm-rig")
_BRIDGE = "tfbr0"
_PREFIX = "twofour-slurm-"
_NET = "10.77.0"
_CONF = """
ClusterName=twofour
SlurmctldHost=tfctl({net}.1)
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=5
KillWait=20
OverTimeLimit=0
SlurmdTimeout={slurmd_timeout}
GresTypes=gpu
NodeName={hosts} NodeAddr={net}.1[0-1] CPUs=8 CoresPerSocket=8 RealMemory=4000
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10
"""


def why_not() -> str | None:
    """What keeps the rig from being used here; None: nothing."""
    missing = [name for name in PROGRAMS if _which(name) is None]
    if missing:
        return f"no {', '.join(missing)} here (Debian: slurm-wlm, munge, tini, iproute2)"
    if os.geteuid() != 0:
        return "only root may make the hosts' network namespaces"
    made = _ip("netns", "add", "tfprobe", check=False)
    if made.returncode != 0:
        return f"network namespaces cannot be made here ({made.stderr.strip()})"
    _ip("netns", "del", "tfprobe")
    return None


def _which(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _ip(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(_which("ip")), *words], check=check, capture_output=True, text=True)


def _opening(paths: Sequence[Path]) -> str:
    """Shell commands after which every user reaches these paths; for a mount namespace of its own.

    A parent folder that is closed to others, such as root's home, is hidden by an open one with
    nothing but these paths in it. `/mnt` is an empty folder then.
    """
    closed: dict[Path, list[Path]] = {}
    for path in dict.fromkeys(path.resolve() for path in paths):
        parents = (parent for parent in reversed(path.parents) if not parent.stat().st_mode & 1)
        if (parent := next(parents, None)) is not None:
            closed.setdefault(parent, []).append(path)
    words = []
    for number, (parent, inside) in enumerate(closed.items()):
        old, new = Path(f"/mnt/closed-{number}"), shlex.quote(str(parent))
        words.append(f"mkdir {old} && mount --rbind {new} {old} && ")
        words.append(f"mount -t tmpfs -o mode=711 tmpfs {new} && ")
        for path in inside:
            there, here = (
                shlex.quote(str(name)) for name in (old / path.relative_to(parent), path)
            )
            words.append(f"mkdir -p {here} && mount --rbind {there} {here} && ")
    return "".join(words)


class Rig:
    """The running Slurm.

    Args:
        folder: state, logs and sockets of it.
        shared: folders below /tmp that both hosts and this machine see; the rest is each one's own.
        for_all: paths elsewhere that users other than root are to reach too.

    Attributes:
        environment: of commands such as sbatch that are to reach it.
    """

    def __init__(
        self, folder: Path, shared: Sequence[Path] = (), for_all: Sequence[Path] = ()
    ) -> None:
        self.folder = folder
        self._opening = _opening(for_all)
        self._opening_on_hosts = _opening(
            [path for path in for_all if not path.is_relative_to("/tmp")]
        )
        self._shared = [folder, *shared]
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def slurm(self, *words: str) -> str:
        """What a command of Slurm prints."""
        done = subprocess.run(
            words, env=self.environment, capture_output=True, text=True, timeout=60, check=False
        )
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
        return done.stdout.strip()

    def wait_for(self, what: str, is_there: object, seconds: float) -> None:
        """Wait until the callable `is_there` says so.

        Raises:
            TimeoutError: it does not, with `what`.
        """
        deadline = time.monotonic() + seconds
        while not is_there():  # type: ignore[operator]
            if time.monotonic() > deadline:
                hosts = self.slurm("sinfo", "-h", "-N", "-o", "%N %T %E")
                queue = self.slurm("squeue", "-h", "-o", "%i %T %r")
                raise TimeoutError(f"not within {seconds} s: {what}; {hosts!r}, {queue!r}")
            time.sleep(0.5)

    def cut(self, host: str, is_cut: bool = True) -> None:
        """Pull the host's network cable, or plug it in again."""
        _ip("link", "set", f"{host}v", "down" if is_cut else "up")

    def slurmd_timeout(self, seconds: int) -> None:
        """How long Slurm waits for a host that does not answer before it gives it up."""
        path = self.folder / "slurm.conf"
        text = path.read_text(encoding="utf-8")
        path.write_text(
            re.sub(r"(?m)^SlurmdTimeout=.*$", f"SlurmdTimeout={seconds}", text), encoding="utf-8"
        )
        self.slurm("scontrol", "reconfigure")

    def on(self, host: str, *words: str) -> list[str]:
        """The command that runs these words on a host, in its network, files and processes."""
        return ["nsenter", f"--target={self._init_of(host)}", "--all", "--", *words]

    def as_user(self, name: str, home: Path, directory: Path) -> list[str]:
        """Words before a command here that make it another user's."""
        who = pwd.getpwnam(name)
        inside = (
            f"mount -t tmpfs tmpfs /mnt && {self._opening} cd {shlex.quote(str(directory))} && "
            f"exec setpriv --reuid={who.pw_uid} --regid={who.pw_gid} --clear-groups "
            f'env HOME={shlex.quote(str(home))} "$@"'
        )
        return ["unshare", "--mount", "sh", "-c", inside, "sh"]

    def _init_of(self, host: str) -> int:
        """Number here of the host's first process: the child of the `unshare` that made it."""
        pid = self._daemons[2 + HOSTS.index(host)].pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8")
        return int(children.split()[0])

    def _network(self) -> None:
        _ip("link", "add", "name", _BRIDGE, "type", "bridge")
        _ip("addr", "add", f"{_NET}.1/24", "dev", _BRIDGE)
        _ip("link", "set", _BRIDGE, "up")
        for number, host in enumerate(HOSTS):
            _ip("netns", "add", host)
            _ip("link", "add", f"{host}v", "type", "veth", "peer", "name", "eth0", "netns", host)
            _ip("link", "set", f"{host}v", "master", _BRIDGE)
            _ip("link", "set", f"{host}v", "up")
            for words in (
                ("addr", "add", f"{_NET}.{10 + number}/24", "dev", "eth0"),
                ("link", "set", "eth0", "up"), ("link", "set", "lo", "up"),
            ):  # fmt: skip
                _ip("-n", host, *words)

    def _start(self, words: list[str], log: str) -> None:
        with (self.folder / log).open("wb") as file:
            self._daemons.append(
                # Dies with this process, however that ends: a next rig finds its ports free.
                subprocess.Popen(
                    ["setpriv", "--pdeathsig", "KILL", "--", *words],
                    env=self.environment,
                    stdout=file,
                    stderr=file,
                    stdin=subprocess.DEVNULL,
                )
            )

    def start(self, slurmd_timeout_s: int = 30) -> None:
        """Bring it up; both hosts are idle when this returns."""
        folder = self.folder
        conf = _CONF.format(
            net=_NET, folder=folder, hosts="tfn[0-1]", slurmd_timeout=slurmd_timeout_s
        )
        (folder / "slurm.conf").write_text(conf.lstrip(), encoding="utf-8")
        (folder / "state").mkdir()
        hosts = "127.0.0.1 localhost\n" + "".join(
            f"{_NET}.{10 + number} {host}\n" for number, host in enumerate(HOSTS)
        )
        (folder / "hosts").write_text(f"{hosts}{_NET}.1 tfctl\n", encoding="utf-8")
        self._network()
        subprocess.run(
            [str(_which("mungekey")), "--create", f"--keyfile={folder}/munge.key"], check=True
        )
        self._start(
            [
                str(_which("munged")), "--foreground", "--force", f"--key-file={folder}/munge.key",
                f"--socket={folder}/munge.socket", f"--log-file={folder}/munged.log",
                f"--pid-file={folder}/munged.pid", f"--seed-file={folder}/munge.seed",
            ],
            "munged.out",
        )  # fmt: skip
        self.wait_for("munge's socket", (folder / "munge.socket").exists, 20)
        # slurmctld asks for its own host's name: a name space for that alone.
        self._start(
            [
                "unshare", "--uts", "--mount", "sh", "-c",
                f"mount --bind {folder}/hosts /etc/hosts && hostname tfctl && "
                f"exec {_which('slurmctld')} -D -i",
            ],
            "slurmctld.out",
        )  # fmt: skip
        # Its own /tmp, but for what a cluster has on a shared disk.
        back = "".join(
            f"mkdir -p {path} && mount --bind /mnt/old/{path.relative_to('/tmp')} {path} && "
            for path in self._shared
        )
        for host in HOSTS:
            inside = (
                f"mount --bind {folder}/hosts /etc/hosts && "
                "mount -t tmpfs tmpfs /mnt && mkdir /mnt/old && mount --rbind /tmp /mnt/old && "
                f"{self._opening_on_hosts}"
                f"mount -t tmpfs tmpfs /tmp && chmod 1777 /tmp && {back}"
                "mount -t tmpfs tmpfs /dev/shm && "
                f"hostname {host} && exec {_which('slurmd')} -D -N {host}"
            )
            self._start(
                [
                    "nsenter", f"--net=/var/run/netns/{host}", "unshare", "--uts", "--pid",
                    "--mount", "--fork", "--kill-child", "--mount-proc",
                    str(_which("tini")), "-g", "--", "sh", "-c", inside,
                ],
                f"slurmd-{host}.out",
            )  # fmt: skip
        self.wait_for("both hosts to be idle", self.is_idle, 60)

    def is_idle(self) -> bool:
        """Whether both hosts are up and do nothing."""
        with contextlib.suppress(RuntimeError):
            return self.slurm("sinfo", "-h", "-N", "-p", "main", "-o", "%t").split() == ["idle"] * 2
        return False

    def stop(self) -> None:
        """End what `start` began, in whatever state it is."""
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        _remove_network()


def _remove_network() -> None:
    """Take down what `Rig._network` made, as far as it is there."""
    for host in HOSTS:
        _ip("netns", "del", host, check=False)
        _ip("link", "del", f"{host}v", check=False)
    _ip("link", "del", _BRIDGE, check=False)


@contextlib.contextmanager
def _only_rig() -> Iterator[None]:
    """Wait until no other process of this machine has a rig; what a killed one left is removed."""
    with _LOCK.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        _remove_network()
        for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
            shutil.rmtree(folder, ignore_errors=True)
        yield


@contextlib.contextmanager
def running(
    shared: Sequence[Path] = (), slurmd_timeout_s: int = 30, for_all: Sequence[Path] = ()
) -> Iterator[Rig]:
    """The rig, from its start to its end, in a folder of its own; one at a time on a machine."""
    with _only_rig(), tempfile.TemporaryDirectory(prefix=_PREFIX) as name:
        Path(name).chmod(0o755)
        rig = Rig(Path(name), shared, for_all)
        try:
            rig.start(slurmd_timeout_s)
            yield rig
        finally:
            rig.stop()


if __name__ == "__main__":
    if reason := why_not():
        sys.exit(reason)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    with (
        running([Path(word) for word in sys.argv[1:]]) as started,
        contextlib.suppress(KeyboardInterrupt),
    ):
        print(f"export SLURM_CONF={started.folder}/slurm.conf", flush=True)
        signal.pause()
