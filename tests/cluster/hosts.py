"""Several machines on this one: network namespaces with addresses and names of their own, joined by a bridge.

What runs "on" a host sees its own name and address and reaches the others over the network, by ssh too; files and cores
are shared, as they are on a cluster. Needs root, iproute2 and, for ssh, openssh-server.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from cprec.process import die_with_parent

ENTER = ('mkdir -p ~/.ssh && mount --bind "$1/etc/hosts" /etc/hosts && mount --bind "$1/ssh" ~/.ssh && '
         'hostname "$2" && shift 2 && exec "$@"')
SSHD = """Port 22
HostKey {folder}/id_ed25519
AuthorizedKeysFile {folder}/id_ed25519.pub
PermitRootLogin yes
StrictModes no
UsePAM no
PidFile none
"""


class Hosts:
    """The hosts `names`, with addresses `subnet`.1, .2, ...; this process is at `subnet`.254."""

    def __init__(self, names: Sequence[str], folder: Path, *, subnet: str) -> None:
        self.names = list(names)
        self.here = f"{subnet}.254"
        self.address = {name: f"{subnet}.{i}" for i, name in enumerate(names, 1)}
        self._folder = folder
        self._bridge = f"cprec{os.getpid()}"
        self._sshds: list[subprocess.Popen[bytes]] = []
        (folder / "etc").mkdir()
        (folder / "ssh").mkdir(mode=0o700)
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in self.address.items())]
        (folder / "etc/hosts").write_text("\n".join(lines) + "\n")

    def on(self, name: str, *command: str) -> list[str]:
        """The command that runs `command` on a host."""
        return ["nsenter", f"--net=/run/netns/{self._space(name)}", "unshare", "--uts", "--mount", "sh", "-c", ENTER,
                "sh", str(self._folder), name, *command]

    def processes(self, name: str, *, of: str = "") -> list[int]:
        """The processes of a host whose command line has `of` in it."""
        listed = subprocess.run(["ip", "netns", "pids", self._space(name)], capture_output=True, text=True, check=True)
        return [pid for pid in map(int, listed.stdout.split()) if of in _command_line(pid)]

    def power_off(self, name: str) -> None:
        """Cut a host off and end its processes: nobody hears of it, as when it loses its power."""
        _ip(f"-n {self._space(name)} link set eth0 down")
        for pid in self.processes(name):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def power_on(self, name: str) -> None:
        """Have the network reach a host again; nothing runs on it yet."""
        _ip(f"-n {self._space(name)} link set eth0 up")

    def start_ssh(self) -> None:
        """Let every host be reached from every other by `ssh NAME`, with a key made for the purpose."""
        folder = self._folder / "ssh"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "id_ed25519")], check=True)
        (folder / "config").write_text("StrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\n")
        (folder / "sshd").write_text(SSHD.format(folder=folder))
        Path("/run/sshd").mkdir(exist_ok=True)  # of Debian's sshd, which elsewhere its service makes
        for name in self.names:
            with (folder / f"sshd.{name}").open("wb") as log:
                command = self.on(name, "/usr/sbin/sshd", "-D", "-e", "-f", str(folder / "sshd"))
                self._sshds.append(subprocess.Popen(command, stdout=log, stderr=log,
                                                    preexec_fn=lambda: die_with_parent(signal.SIGTERM)))

    def up(self) -> None:
        _ip(f"link add {self._bridge} type bridge", f"addr add {self.here}/24 dev {self._bridge}",
            f"link set {self._bridge} up")
        for i, name in enumerate(self.names):
            space, link = self._space(name), f"cp{os.getpid()}v{i}"
            _ip(f"netns add {space}", f"link add {link} type veth peer name eth0 netns {space}",
                f"link set {link} master {self._bridge} up", f"-n {space} addr add {self.address[name]}/24 dev eth0",
                f"-n {space} link set eth0 up", f"-n {space} link set lo up")

    def down(self) -> None:
        for name in self.names:
            self.power_off(name)
            _ip(f"netns del {self._space(name)}")
        for sshd in self._sshds:
            sshd.wait()
        _ip(f"link del {self._bridge}")

    def _space(self, name: str) -> str:
        return f"{self._bridge}-{name}"


@contextmanager
def running_hosts(names: Sequence[str], folder: Path) -> Iterator[Hosts]:
    """Hosts for the time inside; skips the test where there is no right to make them."""
    made = Hosts(names, folder, subnet=f"10.77.{os.getpid() % 250}")
    try:
        made.up()
    except (OSError, subprocess.CalledProcessError) as e:
        pytest.skip(f"no network namespaces: {getattr(e, 'stderr', e)} (needs root and iproute2)")
    try:
        yield made
    finally:
        made.down()


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:  # it has ended
        return ""


def _ip(*commands: str) -> None:
    for command in commands:
        subprocess.run(["ip", *shlex.split(command)], check=True, capture_output=True, text=True)
