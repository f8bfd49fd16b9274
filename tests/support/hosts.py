"""Several hosts on this machine: network namespaces that share files and processors, not addresses or ports.

This process stays where it is and reaches them. Needs Linux, root and iproute2.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from types import TracebackType

HUB = "study-hub"
NETWORK = "10.99.0.0/24"


def can_be_made() -> bool:
    return sys.platform == "linux" and os.geteuid() == 0 and shutil.which("ip") is not None


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


class Hosts:
    """Hosts on one switch, at 10.99.0.1, 10.99.0.2, …; use as a context, which takes them down."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def __enter__(self) -> Hosts:
        _ip("netns", "add", HUB)
        _ip("-n", HUB, "link", "add", "switch", "type", "bridge")
        _ip("-n", HUB, "link", "set", "switch", "up")
        _ip("link", "add", "study-here", "type", "veth", "peer", "name", "here", "netns", HUB)
        _ip("-n", HUB, "link", "set", "here", "master", "switch", "up")
        _ip("address", "add", "10.99.0.254/24", "dev", "study-here")
        _ip("link", "set", "study-here", "up")
        for name in self.names:
            space = f"study-{name}"
            _ip("netns", "add", space)
            _ip("-n", space, "link", "set", "lo", "up")
            _ip("-n", HUB, "link", "add", name, "type", "veth", "peer", "name", "eth", "netns", space)
            _ip("-n", HUB, "link", "set", name, "master", "switch", "up")
            _ip("-n", space, "address", "add", f"{self.address(name)}/24", "dev", "eth")
            _ip("-n", space, "link", "set", "eth", "up")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for name in (HUB, *(f"study-{name}" for name in self.names)):
            subprocess.run(["ip", "netns", "del", name], check=False, stderr=subprocess.DEVNULL)

    def address(self, name: str) -> str:
        return f"10.99.0.{self.names.index(name) + 1}"

    def at(self, name: str) -> list[str]:
        """What to write before a command that is to run there."""
        return ["ip", "netns", "exec", f"study-{name}"]

    def enter(self, name: str) -> None:
        """Move this thread, and what it starts from now on, there."""
        self.move(os.open(f"/run/netns/study-{name}", os.O_RDONLY))

    @staticmethod
    def move(space: int) -> None:
        """Args: space: an open namespace, which is then closed."""
        if ctypes.CDLL(None, use_errno=True).setns(space, 0):
            raise OSError(ctypes.get_errno(), "setns")
        os.close(space)

    def cut(self, name: str) -> None:
        """Pull its cable."""
        _ip("-n", HUB, "link", "set", name, "down")

    def mend(self, name: str) -> None:
        _ip("-n", HUB, "link", "set", name, "up")


class Database:
    """A PostgreSQL on one of the hosts, which trusts all of them."""

    def __init__(self, hosts: Hosts, name: str) -> None:
        code = (
            f"from tests.support.postgres import Postgres; p = Postgres('0.0.0.0', '{NETWORK}')\n"
            "print(p.port, flush=True)\n"
            "while input(): print(p.new_database().rpartition('/')[2], flush=True)\n"
            "p.stop()"
        )
        command = [*hosts.at(name), sys.executable, "-c", code]
        self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._where = f"postgresql://postgres@{hosts.address(name)}:{self._answer()}"

    def _answer(self) -> str:
        assert self._server.stdout is not None
        return self._server.stdout.readline().strip()

    def new_database(self) -> str:
        assert self._server.stdin is not None
        self._server.stdin.write("another\n")
        self._server.stdin.flush()
        return f"{self._where}/{self._answer()}"

    def stop(self) -> None:
        self._server.communicate("\n")
