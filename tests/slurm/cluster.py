"""A private Slurm of two nodes, n1 and n2, emulated on this machine: the real daemons, nothing of a fake.

This file is two things. `Cluster` is what tests talk to. Run as a script it is the keeper, a process of its own that
starts the daemons and ends them when its standard input closes. So nothing is left however the tests end: a test that
fails, Ctrl-C, a time-out, kill -9.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "sinfo")
NODES = ("n1", "n2")
HOSTS = Path("/etc/hosts")
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
ROOT = Path(__file__).parent.parent.parent
UNFINISHED = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "STOPPED")

# The short times: a signed credential must expire before a requeued job may start (two minutes by default), and a dead
# node is noticed after SlurmdTimeout (five minutes). config_overrides: four CPUs a node, however many there really are.
CONFIG = """\
ClusterName=private
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmdTimeout=10
KillWait=5
ReturnToService=2
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
FirstJobId={first_job}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4
PartitionName=all Nodes=ALL Default=YES State=UP
"""


def obstacle() -> str | None:
    """Why there can be no cluster on this machine, or None."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"Slurm is not installed ({', '.join(missing)}); on Debian: apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "the daemons of a private Slurm need root"
    return None


class Cluster:
    """Submits jobs to the private Slurm, from the root of the repository.

    Raises:
        RuntimeError: it did not come up; with the end of the daemons' logs.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: a socket's path has at most 107 characters
        # Jobs inherit it. Both nodes are this machine, under two names.
        self.environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf"), "PYTHON": sys.executable,
                            "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}  # fmt: skip
        self._revived: list[subprocess.Popen] = []
        # A session of its own: Ctrl-C goes to the tests alone, which then close the pipe.
        self._keeper = subprocess.Popen(
            [sys.executable, __file__, str(self.folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        line = self._keeper.stdout.readline()
        if line != "ready\n":
            raise RuntimeError(f"the private Slurm did not come up: {line}{self._keeper.communicate()[0]}")

    def close(self) -> None:
        """Ends all jobs and daemons, and waits until they are gone."""
        for daemon in self._revived:
            daemon.kill()
            daemon.wait()
        self._keeper.communicate(timeout=60)
        assert self._keeper.returncode == 0

    def command(self, *words: object) -> str:
        """What a Slurm command prints."""
        outcome = subprocess.run([str(word) for word in words], env=self.environment, cwd=ROOT, capture_output=True,
                                 text=True, timeout=60)  # fmt: skip
        assert outcome.returncode == 0, f"{words}: {outcome.stderr}"
        return outcome.stdout

    def run(self, script: Path, *arguments: object, options: Sequence[str] = ()) -> int:
        """Submits a batch script with its arguments, and sbatch's options; the job's number."""
        ours = ["--parsable", "--open-mode=append", f"--output={self.folder / '%j.txt'}"]
        return int(self.command("sbatch", *ours, *options, script, *arguments))

    def state(self, job: int) -> str:
        """PENDING, RUNNING, COMPLETED, ...; of an array that of a task that goes on, else of one that failed."""
        states = re.findall(r"JobState=(\w+)", self.command("scontrol", "show", "job", job))
        return max(states, key=lambda state: (state in UNFINISHED, state != "COMPLETED"))

    def wait(self, job: int, seconds: float = 120) -> str:
        """The state in which the job ended."""
        deadline = time.monotonic() + seconds
        while (state := self.state(job)) in UNFINISHED:
            assert time.monotonic() < deadline, f"job {job} is {state} after {seconds} s:\n{self.logs(job)}"
            time.sleep(0.2)
        return state

    def logs(self, job: int) -> str:
        """What the job has printed so far, on both nodes and in all its starts."""
        path = self.folder / f"{job}.txt"
        return path.read_text() if path.exists() else ""

    def restarts(self, job: int) -> int:
        """How often Slurm has started the job again."""
        return int(re.search(r"Restarts=(\d+)", self.command("scontrol", "show", "job", job))[1])

    def kill(self, job: int, rank: int) -> None:
        """kill -9 of one rank, and not of its shell or its loader's workers, as a full memory does."""
        mark = {f"SLURM_JOB_ID={job}", f"SLURM_PROCID={rank}", "SLURM_STEP_ID=0"}
        ranks = [process for process in _processes() if mark <= _environment(process)]
        (shell,) = [process for process in ranks if _parent(process) not in ranks]
        (python,) = [process for process in ranks if _parent(process) == shell]
        os.kill(python, signal.SIGKILL)

    def fail(self, node: str) -> None:
        """A node that Slurm hears nothing of any more: its slurmd and the slurmstepds of its jobs are gone, and what
        they had started runs on.
        """
        tasks = [process for process in _processes() if f"SLURMD_NODENAME={node}" in _environment(process)]
        keepers = {_parent(process) for process in tasks} - set(tasks)
        os.kill(int((self.folder / f"slurmd-{node}.pid").read_text()), signal.SIGKILL)
        for keeper in keepers:
            os.kill(keeper, signal.SIGKILL)

    def revive(self, node: str) -> None:
        with open(self.folder / "revived.log", "ab") as log:
            self._revived.append(subprocess.Popen(["slurmd", "-D", "-N", node], env=self.environment, stdout=log,
                                                  stderr=log, stdin=subprocess.DEVNULL))  # fmt: skip


def _processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").glob("[0-9]*")]


def _environment(process: int) -> set[str]:
    try:
        return set(Path(f"/proc/{process}/environ").read_text(errors="replace").split("\0"))
    except OSError:  # it has ended
        return set()


def _parent(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


# The keeper


def keep(folder: Path) -> int:
    assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0  # job steps leave their parents
    line = _name_nodes()
    try:
        _start(folder)
        print("ready", flush=True)
        sys.stdin.read()  # ends when the tests close the pipe, or end themselves
        return 0
    except (RuntimeError, subprocess.SubprocessError) as error:
        logs = [f"{log.name}:\n{log.read_text()[-2000:]}" for log in sorted(folder.glob("*.log"))]
        print(error, *logs, sep="\n", flush=True)
        return 1
    finally:
        _end()
        if line:
            HOSTS.write_text(HOSTS.read_text().replace(line, ""))
        shutil.rmtree(folder)


def _name_nodes() -> str:
    """Makes n1 and n2 known as names of this machine; the line added to /etc/hosts, or nothing."""
    known = {name for line in HOSTS.read_text().splitlines() for name in line.split("#")[0].split()[1:]}
    if known.issuperset(NODES):
        return ""
    line = f"127.0.0.1 {' '.join(NODES)}\n"
    text = HOSTS.read_text()
    HOSTS.write_text(text + "\n" * (not text.endswith("\n")) + line)
    return line


def _start(folder: Path) -> None:
    folder.chmod(0o755)  # munged wants its socket to be reachable for all
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    # Rendezvous ports are made from job numbers: those of two clusters on one machine must differ.
    config = CONFIG.format(folder=folder, host=socket.gethostname(), ports=ports, first_job=ports[0] % 9000 + 1)
    (folder / "slurm.conf").write_text(config)
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)

    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    daemons = []
    with open(folder / "output.log", "wb") as log:

        def start(*command: str) -> None:
            daemons.append(subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log))

        start("munged", "--foreground", f"--key-file={folder}/munge.key", f"--socket={folder}/munge.socket",
              f"--pid-file={folder}/munged.pid", f"--seed-file={folder}/munged.seed")
        _until((folder / "munge.socket").exists, daemons)
        start("slurmctld", "-D")
        for node in NODES:
            start("slurmd", "-D", "-N", node)

    def idle() -> bool:
        sinfo = ["sinfo", "--noheader", "--Node", "--format=%T"]
        shown = subprocess.run(sinfo, env=environment, capture_output=True, text=True, timeout=30)
        return shown.stdout.split() == ["idle"] * len(NODES)

    _until(idle, daemons)


def _until(condition: Callable[[], bool], daemons: list[subprocess.Popen], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        for daemon in daemons:
            if daemon.poll() is not None:
                raise RuntimeError(f"{daemon.args[0]} ended with exit code {daemon.returncode}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"not up after {seconds} s")
        time.sleep(0.1)


def _end() -> None:
    """Kills and reaps all descendants: what loses its parent becomes a child of the keeper, and is met next round."""
    while children := _children():
        for child in children:
            os.kill(child, signal.SIGKILL)
        os.wait()


def _children() -> list[int]:
    """All that have not been waited for, so that their numbers cannot have passed to others."""
    return [process for process in _processes() if _parent(process) == os.getpid()]


if __name__ == "__main__":
    sys.exit(keep(Path(sys.argv[1])))
