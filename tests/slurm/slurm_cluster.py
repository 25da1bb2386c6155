"""A SLURM of two nodes on this machine: its daemons run on hosts of their own, in the foreground, stopped by pid."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hosts import Hosts, running_hosts

from cprec.launcher import free_port
from cprec.process import die_with_parent

NEEDED = ("slurmctld", "slurmd", "sbatch", "munged", "ip")
NODES = ("n1", "n2")


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
        wait_for(lambda: (munge / "socket").exists(), "munged", within_s=20)
        self._start("slurmctld", "slurmctld", "-D", "-f", str(self.conf))
        for node in NODES:
            self.start_node(node)
        wait_for(lambda: self.node_states() == ["idle", "idle"], "two idle nodes", within_s=60)

    def start_node(self, node: str) -> None:
        """Start (again) the daemon of a node."""
        (self.folder / f"spool.{node}").mkdir(exist_ok=True)
        self._start(node, *self.hosts.on(node, "slurmd", "-D", "-N", node, "-f", str(self.conf)))

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
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=60)
        return done.stdout + done.stderr

    def node_states(self) -> list[str]:
        return self.command("sinfo", "--noheader", "--Node", "--format=%T").split()

    def state(self, job: str) -> str:
        """State of a job, of an array the states of its tasks, as SLURM calls them; it remembers those that ended."""
        shown = self.command("scontrol", "show", "job", "-o", job)
        return " ".join(word.removeprefix("JobState=") for word in shown.split() if word.startswith("JobState="))

    def field(self, job: str, name: str) -> str:
        shown = self.command("scontrol", "show", "job", "-o", job)
        return next((word.partition("=")[2] for word in shown.split() if word.startswith(f"{name}=")), "")

    def hurry(self, job: str) -> None:
        """Let a requeued job begin at once instead of after two minutes."""
        if "PENDING" in self.state(job) and self.field(job, "Restarts") != "0":
            self.command("scontrol", "update", f"jobid={job}", "starttime=now")

    def wait(self, job: str, state: str, *, within_s: float, log: Path | None = None) -> None:
        """Wait until a job is in `state`; a requeued one is let begin at once instead of after two minutes."""

        def is_there() -> bool:
            now = self.state(job)
            if state not in now and any(end in now for end in ("FAILED", "CANCELLED", "TIMEOUT", "COMPLETED")):
                raise AssertionError(f"job {job} is {now}, not {state}\n{_text(log)}")
            self.hurry(job)
            return bool(now) and set(now.split()) == {state}

        wait_for(is_there, f"job {job} to be {state}", within_s=within_s, log=log)

    def _start(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(command, stdout=out, stderr=out, env=self.environment,
                                                   preexec_fn=lambda: die_with_parent(signal.SIGTERM))


@contextmanager
def running_slurm(folder: Path) -> Iterator[Slurm]:
    """SLURM for the time inside; skips the test where a part of it is not installed."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)}: apt-get install slurmctld slurmd slurm-client munge iproute2")
    with running_hosts(NODES, folder) as hosts:
        slurm = Slurm(folder, hosts)
        try:
            slurm.start()
            yield slurm
        finally:
            slurm.stop()


def wait_for(is_so: Callable[[], bool], what: str, *, within_s: float, log: Path | None = None) -> None:
    """Ask again and again until it is so."""
    deadline = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < deadline, f"waited {within_s:.0f} s for {what}\n{_text(log)}"
        time.sleep(0.2)


def _text(log: Path | None) -> str:
    return log.read_text() if log and log.exists() else ""


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
JobRequeue=1
KillWait=20
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
{nodes}PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE OverTimeLimit=0 State=UP
"""
