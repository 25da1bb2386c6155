"""A SLURM of two nodes on this machine: its daemons run on hosts of their own, in the foreground, stopped by pid."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import distributions
from pathlib import Path

import pytest
from hosts import Hosts, running_hosts

from cprec.launcher import free_port
from cprec.process import die_with_parent

NEEDED = ("slurmctld", "slurmd", "sbatch", "munged", "ip")
NODES = ("n1", "n2")
LIMIT_S = 1500.0
"""How long to wait for anything: far longer than it takes, as the machine may be busy."""
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")


class Slurm:
    """A running SLURM. `environment` lets commands find it; jobs inherit it."""

    def __init__(self, folder: Path, hosts: Hosts) -> None:
        self.folder, self.hosts = folder, hosts
        self.conf = folder / "slurm.conf"
        self.environment = {**{k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))},
                            "SLURM_CONF": str(self.conf)}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        (self.folder / "state").mkdir()
        self.conf.write_text(_conf(self.folder, self.hosts))
        munge = self.folder / "munge"
        munge.mkdir(mode=0o755)
        (munge / "key").write_bytes(os.urandom(128))
        (munge / "key").chmod(0o400)
        self._start("munged", "munged", "--foreground", "--force", f"--socket={munge / 'socket'}",
                    f"--key-file={munge / 'key'}", f"--pid-file={munge / 'pid'}", f"--log-file={munge / 'log'}",
                    f"--seed-file={munge / 'seed'}")
        wait_for((munge / "socket").exists, "munged", self.folder / "munged.out")
        self._start("slurmctld", "slurmctld", "-D", "-f", str(self.conf))
        for node in NODES:
            self._start_node(node)
        wait_for(lambda: self.node_states() == ["idle", "idle"], "two idle nodes", self.folder / "slurmctld.out")

    def lose(self, node: str) -> None:
        """Switch a node off, and have SLURM notice at once instead of after SlurmdTimeout."""
        self.hosts.power_off(node)
        self._daemons[node].wait()
        self.command("scontrol", "update", f"nodename={node}", "state=down", "reason=lost")

    def repair(self, node: str) -> None:
        """Switch a lost node on again."""
        self.hosts.power_on(node)
        self._start_node(node)
        self.command("scontrol", "update", f"nodename={node}", "state=resume")
        wait_for(lambda: not any(word in " ".join(self.node_states()) for word in ("down", "unknown", "*")),
                 f"{node} to be back", self.folder / f"{node}.out")

    def stop(self) -> None:
        self.command("scancel", "--user=root")
        for daemon in self._daemons.values():
            daemon.terminate()
        for daemon in self._daemons.values():
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def command(self, *words: str) -> str:
        """What a SLURM command prints."""
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=LIMIT_S)
        return done.stdout + done.stderr

    def node_states(self) -> list[str]:
        return self.command("sinfo", "--noheader", "--Node", "--partition=main", "--format=%T").split()

    def states(self, job: str) -> set[str]:
        """State of a job as SLURM calls it, of an array those of its tasks; also of those that have ended."""
        return set(self._fields(job, "JobState"))

    def field(self, job: str, name: str) -> str:
        return next(iter(self._fields(job, name)), "")

    def hurry(self, job: str) -> None:
        """Let a requeued job begin at once instead of after two minutes."""
        if self.states(job) == {"PENDING"} and self.field(job, "Restarts") != "0":
            self.command("scontrol", "update", f"jobid={job}", "starttime=now")

    def wait(self, job: str, state: str, log: Path) -> None:
        """Wait until a job is in `state`; fails, with its log, when it ends in another one."""

        def is_there() -> bool:
            now = self.states(job)
            assert not now - {state} & set(ENDED), f"job {job} is {now}, not {state}\n{_text(log)}"
            self.hurry(job)
            return now == {state}

        wait_for(is_there, f"job {job} to be {state}", log)

    def _fields(self, job: str, name: str) -> list[str]:
        shown = self.command("scontrol", "show", "job", "-o", job)
        return [word.partition("=")[2] for word in shown.split() if word.startswith(f"{name}=")]

    def _start_node(self, node: str) -> None:
        """The daemon of a node, and with it the node's jobs, on a core of its own where there are enough."""
        (self.folder / f"spool.{node}").mkdir(exist_ok=True)
        cores = sorted(os.sched_getaffinity(0))
        core = cores[NODES.index(node) % len(cores)]
        self._start(node, *self.hosts.on(node, "slurmd", "-D", "-N", node, "-f", str(self.conf)), core=core)

    def _start(self, name: str, *command: str, core: int | None = None) -> None:
        def before() -> None:
            die_with_parent(signal.SIGTERM)
            if core is not None:
                os.sched_setaffinity(0, {core})

        with (self.folder / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(command, stdout=out, stderr=out, env=self.environment,
                                                   preexec_fn=before)


@contextmanager
def running_slurm(folder: Path) -> Iterator[Slurm]:
    """SLURM for the time inside; skips the test where a part of it is not installed."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)}: apt-get install slurmctld slurmd slurm-client munge iproute2")
    for package in ("mpi4py", "mpich"):
        if not any(distributions(name=package)):
            pytest.skip(f"no {package}, which srun starts a preparation with: pip install mpi4py mpich==5.0.2")
    with running_hosts(NODES, folder) as hosts:
        slurm = Slurm(folder, hosts)
        try:
            slurm.start()
            yield slurm
        finally:
            slurm.stop()


def wait_for(is_so: Callable[[], bool], what: str, log: Path) -> None:
    """Ask again and again until it is so; fails with what `log` says."""
    deadline = time.monotonic() + LIMIT_S
    while not is_so():
        assert time.monotonic() < deadline, f"waited {LIMIT_S:.0f} s for {what}\n{_text(log)}"
        time.sleep(0.2)


def _text(log: Path) -> str:
    return log.read_text(errors="replace") if log.is_file() else ""


def _conf(folder: Path, hosts: Hosts) -> str:
    nodes = "".join(f"NodeName={n} NodeHostname={n} NodeAddr={hosts.address[n]} CPUs=2 RealMemory=8000 State=UNKNOWN\n"
                    for n in NODES)
    return f"""ClusterName=test
SlurmctldHost={os.uname().nodename}({hosts.here})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SlurmctldPort={free_port()}
SlurmdPort=16818
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool.%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=20
MessageTimeout=60
MinJobAge=86400
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
{nodes}PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=100
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
"""
