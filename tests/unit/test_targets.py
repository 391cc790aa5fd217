from __future__ import annotations

import json
import os
import socket
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from partial_fc import targets
from partial_fc.targets import clear_targets, reachable_host, read_targets, targets_file, targets_of, write_targets

ENDPOINTS: list[tuple[str, int | None]] = [("10.0.0.1", 9400), ("10.0.0.1", None), ("fd00::2", 9400), ("[::3]", 9401)]


def test_a_target_a_rank_that_serves() -> None:
    assert targets_of(ENDPOINTS, run="r100", tls=False) == [
        {"targets": ["10.0.0.1:9400"], "labels": {"run": "r100", "rank": "0"}},
        {"targets": ["[fd00::2]:9400"], "labels": {"run": "r100", "rank": "2"}},
        {"targets": ["[::3]:9401"], "labels": {"run": "r100", "rank": "3"}},
    ]
    (encrypted,) = targets_of([("node1", 9400)], run="r100", tls=True)
    # A label: beside the labels Prometheus would refuse it.
    assert encrypted == {"targets": ["node1:9400"], "labels": {"run": "r100", "rank": "0", "__scheme__": "https"}}
    assert targets_of([("node1", None)], run="r100", tls=True) == []


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run's."""
    made = tmp_path / "runs" / "r100-2"
    made.mkdir(parents=True)
    return made


def test_the_file_is_written_read_and_cleared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_targets(folder) == []
    clear_targets(folder)
    assert list(folder.parent.iterdir()) == [folder], "a run without endpoints has no file"
    written = targets_of(ENDPOINTS, run='a "quoted"\nn\u00e4me', tls=True)
    write_targets(folder, written)
    # Prometheus takes a star in the last part only: the files of all runs are in one folder.
    file = folder.parent / "targets" / "r100-2.json"
    assert list(file.parent.iterdir()) == [file] and list(folder.iterdir()) == []
    assert read_targets(folder) == json.loads(file.read_text()) == written
    monkeypatch.chdir(folder)
    assert read_targets(Path(".")) == written, "however the run is named"
    clear_targets(folder)
    assert json.loads(file.read_text()) == read_targets(folder) == []


def test_runs_have_a_file_each(folder: Path) -> None:
    other = folder.with_name("r100-2.5")
    write_targets(folder, targets_of([("a", 1)], run="a", tls=False))
    write_targets(other, targets_of([("b", 1)], run="b", tls=False))
    clear_targets(folder)
    assert read_targets(folder) == [] and read_targets(other)[0]["targets"] == ["b:1"]
    assert targets_file(other) != targets_file(folder)


def test_a_reader_never_sees_half_a_file(folder: Path) -> None:
    written = targets_of([("node", 9400 + rank) for rank in range(2000)], run="r100", tls=False)
    write_targets(folder, written)
    done = threading.Event()

    def write() -> None:
        for _ in range(20):
            write_targets(folder, written)
            write_targets(folder, written[:1])
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    lengths = set()
    try:
        while not done.is_set():
            lengths.add(len(json.loads(targets_file(folder).read_text())))
    finally:
        writer.join()
    assert lengths <= {1, 2000}


def test_a_full_disk_is_a_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_targets(folder, targets_of([("old", 9400)], run="r100", tls=False))
    file = targets_file(folder)

    def full(source: Any, target: Any) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patched:
        patched.setattr(targets.os, "replace", full)
        write_targets(folder, [])
    assert f"{file} can't be written (No space left on device)" in caplog.text
    assert list(file.parent.iterdir()) == [file], "nothing is left behind"
    assert read_targets(folder)[0]["targets"] == ["old:9400"]
    # In the folder's place is a file.
    file.unlink()
    file.parent.rmdir()
    file.parent.write_text("")
    write_targets(folder, [])
    clear_targets(folder)
    assert len(caplog.records) == 2 and read_targets(folder) == []


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff", b"{}", b"null", b"[1, null, []]", b"[" * 100_000, b'[{"targets": "a:1", "labels": {}}]'],
    ids=lambda content: repr(content[:12]),
)
def test_garbage_is_no_target(folder: Path, content: bytes) -> None:
    write_targets(folder, [])
    targets_file(folder).write_bytes(content)
    assert read_targets(folder) == []


def test_what_is_whole_beside_garbage_is_a_target(folder: Path) -> None:
    good = {"targets": ["a:1"], "labels": {"run": "x", "rank": "0"}}
    bad = [
        {**good, "targets": []},
        {**good, "targets": [1]},
        {**good, "labels": {"run": "x"}},
        {**good, "labels": {"run": "x", "rank": 0}},
        {**good, "labels": None},
        {"labels": good["labels"]},
    ]
    write_targets(folder, [*bad, good])
    assert read_targets(folder) == [good]


def test_a_host_is_what_is_advertised_or_listened_on() -> None:
    assert reachable_host("0.0.0.0", "gpu-7.cluster", "10.0.0.1") == "gpu-7.cluster"
    assert reachable_host("127.0.0.1", None, "192.0.2.1") == "127.0.0.1"
    assert reachable_host("node3", None, None) == "node3"
    assert reachable_host("fd00::2", None, None) == "fd00::2"


class FakeNetwork:
    """A machine whose addresses towards others are those of a table."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, hosts: dict[str, str], sources: dict[str, str]) -> None:
        self.hosts, self.sources = hosts, sources
        monkeypatch.setattr(targets.socket, "getaddrinfo", self.getaddrinfo)
        monkeypatch.setattr(targets.socket, "socket", lambda *arguments: FakeSocket(self))
        monkeypatch.setattr(targets.socket, "gethostname", lambda: "this-machine")

    def getaddrinfo(self, host: str, port: int, family: int, type: int) -> list[Any]:
        address = self.hosts.get(host, host)
        if (family == socket.AF_INET6) != (":" in address):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(family, type, 17, "", (address, port))]


class FakeSocket:
    def __init__(self, network: FakeNetwork) -> None:
        self.network = network

    def __enter__(self) -> FakeSocket:
        return self

    def __exit__(self, *_: object) -> None: ...

    def connect(self, place: tuple[str, int]) -> None:
        self.source = self.network.sources.get(place[0])
        if self.source is None:
            raise OSError(101, "Network is unreachable")

    def getsockname(self) -> tuple[str | None, int]:
        return self.source, 4711


@pytest.mark.parametrize(
    ("address", "rendezvous", "host"),
    [
        ("0.0.0.0", "node1", "10.0.0.7"),
        ("::", "node1", "10.0.0.7"),
        ("::", "node6", "fd00::7"),
        # An endpoint of IPv4 alone has no address of IPv6.
        ("0.0.0.0", "node6", "this-machine"),
        # The rendezvous is here: its name often stands for a loopback.
        ("0.0.0.0", "localhost", "this-machine"),
        ("0.0.0.0", "this-machine", "this-machine"),
        ("::", "link-local", "this-machine"),
        ("0.0.0.0", "unreachable", "this-machine"),
        ("0.0.0.0", "x" * 300, "this-machine"),
        ("0.0.0.0", "", "this-machine"),
        ("0.0.0.0", None, "this-machine"),
    ],
)
def test_all_addresses_stand_for_the_one_towards_the_rendezvous(
    address: str, rendezvous: str | None, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = {"node1": "10.0.0.1", "node6": "fd00::1", "localhost": "127.0.0.1", "this-machine": "127.0.1.1"}
    hosts |= {"link-local": "fe80::1", "unreachable": "10.9.9.9"}
    sources = {"10.0.0.1": "10.0.0.7", "fd00::1": "fd00::7", "127.0.0.1": "127.0.0.1", "127.0.1.1": "127.0.0.1"}
    sources |= {"fe80::1": "fe80::7"}
    FakeNetwork(monkeypatch, hosts, sources)
    assert reachable_host(address, None, rendezvous) == host


def test_the_real_network_is_asked_without_a_name_server() -> None:
    assert reachable_host("0.0.0.0", None, "127.0.0.1") == socket.gethostname()
    assert reachable_host("::", None, "::1") == socket.gethostname()
    # Names that can't be names fail before anything is sent.
    assert reachable_host("0.0.0.0", None, "a..b") == socket.gethostname()


def test_users_who_share_the_runs_share_the_folder_and_others_may_read(tmp_path: Path) -> None:
    shared = tmp_path / "runs"
    shared.mkdir()
    shared.chmod(0o1777)
    before = os.umask(0o077)
    try:
        write_targets(shared / "one", targets_of([("host", 9400)], run="one", tls=False))
    finally:
        os.umask(before)
    file = targets_file(shared / "one")
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o1777 and stat.S_IMODE(file.stat().st_mode) == 0o644
    # A folder that is there stays as somebody made it.
    file.parent.chmod(0o755)
    write_targets(shared / "two", [])
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o755
