"""Several hosts on one machine, for tests of a cluster: each boots from a private copy of this machine's disk.

A host is a set of Linux namespaces (network, mounts, name, processes, shared memory). It has an address on a bridge, a
private /tmp and home, and sshd as its first process. Neither other hosts nor this machine see what it writes, except in
/mnt/share, which all hosts share. Needs root, iproute2, openssh-server and rsync; no packet leaves the bridge. This
machine plays the laptop from which the cluster is started.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import distributions
from pathlib import Path

import pytest

from tests.support.command import ROOT

BRIDGE, SUBNET = "dogvae-br", "10.78.0"
LAPTOP = f"{SUBNET}.1"
USER, HOME = "ubuntu", "/home/ubuntu"
VENV = Path(sys.prefix)
SHARE = "/mnt/share"
# As with a machine image, the set-up finds an environment in place; it cannot download another one.
PROFILE = f"export PATH={VENV}/bin:$PATH UV_OFFLINE=1 OMP_NUM_THREADS=1\n"

# The first process of a host. Its disk is an overlay over this machine's, with a private upper layer, in `place`.
INIT = """
set -e
hostname {name}
mkdir -p {place}/written {place}/work {place}/disk
mount -t overlay overlay -o lowerdir=/,upperdir={place}/written,workdir={place}/work {place}/disk
cd {place}/disk
mount -t proc proc proc
mount --rbind /dev dev
mount --rbind /sys sys
mount -t tmpfs tmpfs run
mount -t tmpfs -o mode=1777 tmpfs tmp
mount -t tmpfs -o size=2g tmpfs dev/shm
if [ ! -d .{venv}/bin ]; then
  mkdir -p .{venv} {place}/venv-written {place}/venv-work
  mount -t overlay overlay -o lowerdir={venv},upperdir={place}/venv-written,workdir={place}/venv-work .{venv}
fi
mkdir -p run/sshd .{share}
mount --bind {shared} .{share}
if [ ! -e {place}/booted ]; then
  mkdir -p .{home}
  cp {base}/etc_hosts etc/hosts
  : > etc/resolv.conf
  sed -i '/^{user}:/d' etc/passwd etc/shadow
  sed -i '1i {user}:x:0:0::{home}:/bin/bash' etc/passwd  # first: the name and the home of user 0
  echo '{user}:*:19000:0:99999:7:::' >> etc/shadow
  cp {base}/profile .{home}/.bashrc
  cp {base}/profile .{home}/.profile
  ln -s {venv} .{home}/venv
  touch {place}/booted
fi
exec chroot . /usr/sbin/sshd -D -e -f {base}/sshd_config
"""
SSHD = """
HostKey {base}/hostkey
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
StrictModes no
AuthorizedKeysFile {base}/key.pub
PidFile none
MaxStartups 50
PrintMotd no
Subsystem sftp internal-sftp
"""


def missing() -> str:
    """What this machine lacks for hosts; an empty string if it lacks nothing."""
    if os.geteuid():
        return "root"
    lacking = [name for name in ("ip", "rsync", "unshare", "ssh", "sshd", "uv", "curl") if not _find(name)]
    # A host installs these without a network, so they must be installed here.
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line[:60])
    # The first of a name counts, as for an import: setuptools puts copies of some packages at the end of the path.
    found = reversed(list(distributions()))
    have = {d.name.lower().replace("_", "-"): d.version.partition("+")[0] for d in found}
    lacking += [f"{name}=={pin}" for name, pin in pins.items() if have.get(name, pin) != pin]
    return ", ".join(lacking)


@contextmanager
def workplace() -> Iterator[Path]:
    """A folder for `Hosts`; skips the test on a machine that cannot have hosts.

    This machine has one bridge: tests that run at the same time wait for each other.
    """
    if lacking := missing():
        pytest.skip(f"hosts need {lacking}")
    with (
        open("/var/tmp/dogvae-hosts.lock", "w") as lock,
        tempfile.TemporaryDirectory(prefix="dogvae-", dir="/var/tmp", ignore_cleanup_errors=True) as folder,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield Path(folder)


def _find(name: str) -> str | None:
    return shutil.which(name, path=f"{VENV}/bin:{os.environ['PATH']}:/usr/sbin:/sbin")


def ip(*args: str, check: bool = True) -> str:
    """The output of iproute2's `ip` with these arguments."""
    return subprocess.run(["ip", *args], check=check, capture_output=True, text=True).stdout


class Host:
    """A host with a `name` and an `address`, which can be switched off and disconnected."""

    def __init__(self, hosts: Hosts, name: str, number: int) -> None:
        self._hosts, self.name, self.address = hosts, name, f"{SUBNET}.{10 + number}"
        self._net, self._cable = f"dogvae-{name}", f"dogvae-v{number}"
        self._place = hosts.base / name
        self._process: subprocess.Popen[bytes] | None = None

    def install(self) -> None:
        """Add an empty disk, and a network card with a cable to the bridge."""
        self._place.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16g", "tmpfs", self._place], check=True)
        ip("netns", "add", self._net)
        ip("link", "add", self._cable, "type", "veth", "peer", "name", "eth0", "netns", self._net)
        ip("link", "set", self._cable, "master", BRIDGE, "up")
        ip("-n", self._net, "addr", "add", f"{self.address}/24", "dev", "eth0")
        for device in ("eth0", "lo"):
            ip("-n", self._net, "link", "set", device, "up")
        ip("-n", self._net, "route", "add", "default", "via", LAPTOP)  # without it Ray takes 127.0.0.1 as its address

    def readdress(self, inside: str, outside: str) -> None:
        """Add the addresses of a machine in a cloud: one inside a /16 of all hosts, and one that this machine uses."""
        ip("-n", self._net, "addr", "add", f"{inside}/16", "dev", "eth0")
        ip("-n", self._net, "route", "replace", "default", "via", LAPTOP, "src", inside)
        ip("-n", self._net, "addr", "add", f"{outside}/32", "dev", "eth0")
        ip("route", "replace", f"{outside}/32", "via", self.address)

    def power_on(self) -> None:
        """Boot, and wait until sshd answers."""
        base = self._hosts.base
        script = INIT.format(
            name=self.name, place=self._place, base=base, shared=self._hosts.share, share=SHARE, user=USER,
            home=HOME, venv=VENV,
        )  # fmt: skip
        namespaces = ["--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--propagation", "private"]
        with (base / f"{self.name}.log").open("ab") as log:
            self._process = subprocess.Popen(
                ["ip", "netns", "exec", self._net, "unshare", *namespaces, "bash", "-c", script],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        for _ in range(200):
            assert self._process.poll() is None, (base / f"{self.name}.log").read_text()
            with suppress(OSError):
                socket.create_connection((self.address, 22), timeout=1).close()
                return
            time.sleep(0.05)
        raise AssertionError(f"{self.name} does not answer: {(base / f'{self.name}.log').read_text()}")

    def power_off(self) -> None:
        """Kill all processes of the host. Its disk stays; its /tmp does not."""
        if self._process:
            for pid in ip("netns", "pids", self._net, check=False).split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            self._process.wait()

    def cut(self) -> None:
        """Unplug the cable: packets are lost, and no connection is closed."""
        ip("link", "set", self._cable, "down")

    def inside(self, *command: str) -> list[str]:
        """A command that runs on this machine, but in the network of the host."""
        return ["ip", "netns", "exec", self._net, *command]

    def ssh(self, command: str, timeout: float = 300) -> str:
        """The output of a command typed at the host's prompt; AssertionError if the command fails."""
        done = subprocess.run(self.ssh_command(command), capture_output=True, text=True, timeout=timeout)
        assert done.returncode == 0, f"{self.name}: {command}\n{done.stdout}{done.stderr}"
        return done.stdout

    def ssh_command(self, command: str) -> list[str]:
        """The ssh command that types a command at the host's prompt."""
        quiet = ["-q", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]
        typed = f"bash --login -c {_quoted(f'source ~/.bashrc; {command}')}"
        return ["ssh", *quiet, "-i", str(self._hosts.base / "key"), f"{USER}@{self.address}", typed]

    def remove(self) -> None:
        """Power off, and remove the disk and the network card."""
        self.power_off()
        subprocess.run(["umount", "--lazy", self._place], check=False)
        ip("netns", "del", self._net, check=False)
        ip("link", "del", self._cable, check=False)


class Hosts:
    """The bridge, the hosts by name, and their shared folder. `base` holds keys and logs; it must not be in /tmp."""

    def __init__(self, base: Path, names: Sequence[str], profile: str = "") -> None:
        self.base = base
        self.share = base / "share"
        self._by_name = {name: Host(self, name, number) for number, name in enumerate(names)}
        self.share.mkdir()
        for key in ("key", "hostkey"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", base / key], check=True)
        (base / "sshd_config").write_text(SSHD.format(base=base))
        (base / "profile").write_text(PROFILE + profile)
        lines = ["127.0.0.1 localhost", *(f"{host.address} {name}" for name, host in self._by_name.items())]
        (base / "etc_hosts").write_text("\n".join(lines) + "\n")
        ip("link", "add", BRIDGE, "type", "bridge")
        ip("addr", "add", f"{LAPTOP}/24", "dev", BRIDGE)
        ip("link", "set", BRIDGE, "up")
        for host in self._by_name.values():
            host.install()

    def __getitem__(self, name: str) -> Host:
        return self._by_name[name]

    def close(self) -> None:
        """Remove the hosts and the bridge."""
        for host in self._by_name.values():
            host.remove()
        ip("link", "del", BRIDGE, check=False)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"
