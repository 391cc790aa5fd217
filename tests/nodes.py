"""Nodes for tests of several machines on one: network namespaces with host names of their own, joined by a bridge.

A node has an interface ``eth0`` with an address, a host name, and an ``/etc/hosts`` that names all nodes. Processes are
put on it by the prefix of their command line. Its cable can be pulled and put back. All of it is gone at the end, by a
guard even where the test process is killed.

It takes root (or the capabilities SYS_ADMIN and NET_ADMIN), iproute2 and util-linux.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from tests.jobs import Guard, serve_as_guard
from tests.needs import lacks

INTERFACE = "eth0"
_HOSTS = Path("/etc/netns")
_NAMESPACES = Path("/run/netns")
_SUBNET = "10.199.7"


class NoNamespaces(Exception):
    """This machine or user can't make the nodes; the message names the command and what it said."""


class Node:
    """One machine of :class:`Nodes`.

    Attributes:
        host: its host name.
        address: its IPv4 address.
        environment: what a job on it needs.
    """

    def __init__(self, prefix: str, index: int) -> None:
        self.host = f"node{index}"
        self.address = f"{_SUBNET}.{index + 1}"
        self.environment = {"GLOO_SOCKET_IFNAME": INTERFACE}
        self._namespace, self._switch, self._port = f"{prefix}{self.host}", f"{prefix}switch", f"port{index}"

    @property
    def command(self) -> list[str]:
        """Put before a command line, it runs that on the node, as the same process."""
        become = f'hostname {self.host} && exec "$0" "$@"'
        return ["ip", "netns", "exec", self._namespace, "unshare", "--uts", "sh", "-c", become]

    def make(self, hosts: str) -> None:
        """Make it and plug it into the switch."""
        files = _HOSTS / self._namespace
        with _as_no_namespaces(f"writing {files}"):
            files.mkdir(parents=True)
            (files / "hosts").write_text(hosts, encoding="ascii")
            # Empty, so that a name that isn't in hosts is unknown at once instead of after a server's timeout.
            (files / "resolv.conf").touch()
        _ip("netns", "add", self._namespace)
        cable = ["type", "veth", "peer", "name", INTERFACE, "netns", self._namespace]
        _ip("-n", self._switch, "link", "add", self._port, *cable)
        _ip("-n", self._switch, "link", "set", self._port, "master", "bridge")
        _ip("-n", self._namespace, "address", "add", f"{self.address}/24", "dev", INTERFACE)
        for interface in ("lo", INTERFACE):
            _ip("-n", self._namespace, "link", "set", interface, "up")
        self.plug()

    def unplug(self) -> None:
        """Pull its cable: nothing it sends arrives any more, and nobody is told."""
        _ip("-n", self._switch, "link", "set", self._port, "down")

    def plug(self) -> None:
        """Put the cable back."""
        _ip("-n", self._switch, "link", "set", self._port, "up")


class Nodes:
    """Some nodes on one switch, a context manager that gives them and takes them down.

    Args:
        count: nodes.

    Raises:
        NoNamespaces: on entry; nothing is left of what was made.
    """

    def __init__(self, count: int) -> None:
        self._prefix = f"pfc{os.getpid()}-{secrets.token_hex(2)}-"
        self._nodes = [Node(self._prefix, index) for index in range(count)]
        self._guard: Guard | None = None

    def __enter__(self) -> list[Node]:
        self._guard = Guard("tests.nodes", self._prefix)
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self._nodes

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def _make(self) -> None:
        switch = f"{self._prefix}switch"
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        hosts = "".join(f"{node.address} {node.host}\n" for node in self._nodes)
        for node in self._nodes:
            node.make(f"127.0.0.1 localhost\n{hosts}")
            # A host name of its own may be forbidden where namespaces are not.
            _run([*node.command, "true"])

    def _remove(self) -> None:
        remove_namespaces(self._prefix)
        if self._guard is not None:
            self._guard.dismiss()


def remove_namespaces(prefix: str) -> None:
    """Remove what has a name with this prefix; interfaces go with their namespace."""
    for path in _NAMESPACES.glob(f"{prefix}*"):
        with contextlib.suppress(NoNamespaces):
            _ip("netns", "delete", path.name)
    for path in _HOSTS.glob(f"{prefix}*"):
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def nodes_or_skip(count: int) -> Iterator[list[Node]]:
    """As :class:`Nodes`; skips the test where they can't be made, or fails it where ``PARTIAL_FC_REQUIRE`` asks."""
    with contextlib.ExitStack() as stack:
        try:
            nodes = stack.enter_context(Nodes(count))
        except NoNamespaces as error:
            lacks("namespaces", f"network namespaces can't be made: {error}")
        yield nodes


def _ip(*arguments: str) -> None:
    _run(["ip", *arguments])


def _run(command: list[str]) -> None:
    with _as_no_namespaces(command[0]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    if done.returncode:
        raise NoNamespaces(f"{' '.join(command)}: {done.stderr.strip()}")


@contextlib.contextmanager
def _as_no_namespaces(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise NoNamespaces(f"{what}: {error.strerror}") from error


if __name__ == "__main__":
    serve_as_guard(remove_namespaces)
