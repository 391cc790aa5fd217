"""The nodes of the fault tests: names, the network between them, and that nothing of them stays."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.needs import REQUIRED
from tests.nodes import Node, nodes_or_skip

NAMESPACES, FILES = Path("/run/netns"), Path("/etc/netns")
ROOT = Path(__file__).parents[2]
CONNECT = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], 1), timeout=2)
except ConnectionRefusedError:
    print(socket.gethostname(), "reaches", sys.argv[1])
except OSError as error:
    print(socket.gethostname(), "fails:", type(error).__name__)
"""


def say(node: Node, host: str) -> str:
    """What a process on the node says of reaching a host: one that answers refuses, as nothing listens."""
    command = [*node.command, sys.executable, "-c", CONNECT, host]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()


def left(prefix: str) -> list[Path]:
    return [*NAMESPACES.glob(f"{prefix}*"), *FILES.glob(f"{prefix}*")]


def test_nodes_reach_each_other_by_name_while_the_cable_is_in() -> None:
    with nodes_or_skip(3) as nodes:
        assert len(left(f"pfc{os.getpid()}-")) == 7, "three nodes with their files, and a switch"
        assert say(nodes[0], "node2") == "node0 reaches node2"
        nodes[2].unplug()
        assert say(nodes[0], "node2").startswith("node0 fails") and say(nodes[2], "node1").startswith("node2 fails")
        assert say(nodes[0], "node1") == "node0 reaches node1"
        nodes[2].plug()
        deadline = time.monotonic() + 30
        while say(nodes[0], "node2") != "node0 reaches node2":
            assert time.monotonic() < deadline, "the cable is back, but nothing arrives"
        assert say(nodes[0], "elsewhere") == "node0 fails: gaierror"
    assert not left(f"pfc{os.getpid()}-")


def test_where_nodes_cannot_be_made_the_reason_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ip = tmp_path / "ip"
    ip.write_text("#!/bin/sh\necho 'Operation not permitted' >&2\nexit 1\n", encoding="ascii")
    ip.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(REQUIRED, raising=False)
    reason = "network namespaces can't be made: ip netns add .*: Operation not permitted"
    with pytest.raises(pytest.skip.Exception, match=reason), nodes_or_skip(2):
        pass
    monkeypatch.setenv(REQUIRED, "namespaces")
    with (
        pytest.raises(pytest.fail.Exception, match="PARTIAL_FC_REQUIRE asks for namespaces: network namespaces can"),
        nodes_or_skip(2),
    ):
        pass
    ip.unlink()
    with pytest.raises(pytest.fail.Exception, match="ip: No such file"), nodes_or_skip(2):
        pass
    assert not left(f"pfc{os.getpid()}-")


def test_a_guard_removes_the_nodes_of_a_killed_test_process() -> None:
    with nodes_or_skip(1):
        pass
    code = "import sys, time; from tests.nodes import Nodes; Nodes(2).__enter__(); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert len(left(f"pfc{process.pid}-")) == 5
        process.kill()
    deadline = time.monotonic() + 30
    while left(f"pfc{process.pid}-"):
        assert time.monotonic() < deadline, "the guard left namespaces"
        time.sleep(0.05)
