"""The checks of the preflight, each on made-up machines; several ranks are in tests/distributed/test_doctor.py."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import signal
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch.distributed import HashStore  # type: ignore[attr-defined]

from partial_fc.doctor.board import Board, Ended, Ending, cut_off
from partial_fc.doctor.compare import (
    Needs,
    compare_all,
    compare_configurations,
    compare_data,
    compare_devices,
    compare_environments,
    compare_interfaces,
    compare_links,
    compare_processors,
    compare_run_folders,
    compare_versions,
    step_estimate,
)
from partial_fc.doctor.findings import (
    Finding,
    Hosts,
    Identity,
    Notes,
    Report,
    gather_by_value,
    merge,
    perform,
    read_identity,
    show_ranks,
)
from partial_fc.doctor.interfaces import Interface, Network, check_interfaces, read_network, select_interfaces
from partial_fc.doctor.machine import (
    RESTARTS_SWITCH,
    Gpu,
    check_environment,
    check_gpu,
    check_limits,
    check_processors,
    check_versions,
    read_smi,
)
from partial_fc.doctor.report import CHECKS, in_order, show, verdict, write_json
from partial_fc.doctor.storage import Source, Token, check_data, check_shared, check_writing
from partial_fc.errors import ConfigError, DataError, PartialFCError

ALONE = Identity(0, 1, 0, 1, 0, "here", launched=False)
FIRST_OF_TWO_HOSTS = Identity(0, 4, 0, 2, 0, "node1", launched=True)
UNKNOWN = Needs(None, None, None, 4, {})
H100 = Gpu("H100", "9.0", 80 * 10**9, 79 * 10**9, "GPU-a", "570.1", "Enabled", 0, 50 << 20)


class FakeProbe:
    def __init__(self, *gpus: Gpu) -> None:
        self.gpus = gpus

    def count(self) -> int:
        return len(self.gpus)

    def look(self, index: int) -> Gpu:
        return self.gpus[index]

    def backend(self) -> str | None:
        return "2.27.3"


def reports(facts: dict[str, Any] | list[dict[str, Any]], ranks: int = 4, hosts: int = 2) -> list[Report]:
    """Reports with these facts, the same on each rank or one after the other; ranks spread evenly over hosts."""
    each = facts if isinstance(facts, list) else [facts] * ranks
    return [
        Report(rank, rank * hosts // len(each), f"node{rank * hosts // len(each) + 1}", one, [])
        for rank, one in enumerate(each)
    ]


def hosts_of(of: list[Report]) -> Hosts:
    return Hosts(of, len(of))


def texts(findings: list[Finding], level: str) -> list[str]:
    return [finding.text for finding in findings if finding.level == level]


def only(findings: list[Finding], level: str) -> Finding:
    (found,) = [finding for finding in findings if finding.level == level]
    return found


def told(compare: Callable[..., Iterable[Finding]], of: list[Report], *needs: Needs) -> list[Finding]:
    return list(compare(of, hosts_of(of), *needs))


def found_by(notes: Notes) -> tuple[str, str]:
    ((level, text),) = notes.found
    return level, text


@given(st.sets(st.integers(0, 200)))
def test_ranks_are_shown_as_runs_that_read_back(ranks: set[int]) -> None:
    read: set[int] = set()
    for part in filter(None, show_ranks(ranks).split(", ")):
        first, _, last = part.partition("-")
        read.update(range(int(first), int(last or first) + 1))
    assert read == ranks
    assert show_ranks([6, 0, 1, 3, 2]) == "0-3, 6"


@given(st.dictionaries(st.integers(0, 20), st.one_of(st.none(), st.integers(0, 3), st.lists(st.integers(0, 1)))))
def test_values_are_gathered_once_with_all_their_ranks(values: dict[int, Any]) -> None:
    groups = gather_by_value(values)
    assert {rank: value for value, ranks in groups for rank in ranks} == values
    assert all(one != other for number, (one, _) in enumerate(groups) for other, _ in groups[:number])


def test_places_are_named_by_machine_where_they_can_be() -> None:
    hosts = hosts_of(reports({}))
    assert hosts.describe(()) == hosts.describe((0, 1, 2, 3)) == "all ranks"
    assert hosts.describe((2, 3)) == "node2"
    assert hosts.describe((1,)) == "rank 1 (node1)"
    assert hosts.describe((1, 2, 3)) == "ranks 1-3 (node1, node2)"
    many = hosts_of(reports({}, ranks=12, hosts=6))
    assert many.describe(tuple(range(10))) == "node1, node2, node3 and 2 more"
    assert hosts_of(reports({}, ranks=1, hosts=1)).describe((0,)) == "node1"
    absent = Hosts(reports({}, ranks=1, hosts=1), 2)
    assert absent.describe((1,)) == "rank 1"


def test_two_machines_of_one_name_are_told_apart() -> None:
    twins = [Report(rank, rank, "localhost", {}, []) for rank in range(2)]
    assert Hosts(twins, 2).describe((1,)) == "localhost (node 1)"


def test_the_same_problem_of_several_ranks_is_one_finding() -> None:
    found = [Report(rank, 0, "node1", {}, [("data", "fail", "gone"), ("gpu", "warn", f"{rank}")]) for rank in range(2)]
    assert merge(found) == [
        Finding("fail", "data", "gone", (0, 1)),
        Finding("warn", "gpu", "0", (0,)),
        Finding("warn", "gpu", "1", (1,)),
    ]


def test_who_this_is_comes_from_the_launcher() -> None:
    assert read_identity({}, "here") == ALONE
    environ = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1"}
    me = read_identity(environ, "node2")
    assert me == Identity(5, 8, 1, 4, 1, "node2", launched=True) and me.several_hosts
    with pytest.raises(PartialFCError, match="WORLD_SIZE is 'two', expected a whole number: start the"):
        read_identity({"RANK": "0", "WORLD_SIZE": "two"}, "here")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (DataError("the disk is gone"), "the disk is gone"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x.rec"), "x.rec: No such file: check the path"),
        (ZeroDivisionError("by zero"), "the check itself failed (ZeroDivisionError: by zero)"),
    ],
)
def test_a_check_that_raises_is_a_finding(error: Exception, text: str) -> None:
    def check(notes: Notes) -> None:
        notes.facts["before"] = 1
        raise error

    notes = perform("data", check, 30)
    level, said = found_by(notes)
    assert level == "fail" and said.startswith(text) and notes.facts == {"before": 1}


def test_a_check_that_never_ends_is_left_behind() -> None:
    over = threading.Event()

    def wait(_: Notes) -> None:
        over.wait(60)

    notes = perform("data", wait, 0.05)
    over.set()
    assert found_by(notes)[0] == "fail" and "no answer within 0.05 s" in found_by(notes)[1]


def test_a_check_is_left_behind_where_the_launcher_ends_the_job() -> None:
    started, end = threading.Event(), threading.Event()

    def hang(notes: Notes) -> None:
        started.set()
        end.wait()

    def between() -> None:
        if started.is_set():
            raise Ended

    with pytest.raises(Ended):
        perform("data", hang, 60, between)
    end.set()


def test_the_launchers_signal_ends_what_is_waited_for_once() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Ending(active=True) as ending:
        board = Board(HashStore(), ALONE, ending.check)
        board.put("here", "node1")
        assert board.wait("here", 0, 60) == "node1"
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Ended):
            board.wait("report", 1, 60)
        ending.answer()
        os.kill(os.getpid(), signal.SIGTERM)
        assert board.collect("here", [0, 1], 0) == {0: "node1"}
    with Ending(active=False):
        assert signal.getsignal(signal.SIGTERM) is before
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_the_launcher_cut_off() -> None:
    me = FIRST_OF_TWO_HOSTS
    found = [cut_off(me, *told) for told in (([1], []), ([1, 2, 3], [2]), ([1, 2, 3], [1, 2, 3]))]
    assert [one.ranks for one in found] == [(2, 3), (1, 3), ()]
    assert [one.text.split(" when ")[0].split(" before ")[0] for one in found] == [
        "told nothing",
        "had not joined and measured yet",
        "not at the end yet",
    ]
    assert all(one.level == "fail" and "the launcher ended all ranks (SIGTERM)" in one.text for one in found)


def test_a_local_rank_without_a_gpu_fails() -> None:
    notes = Notes("gpu")
    check_gpu(notes, Identity(1, 2, 1, 2, 0, "node1", True), "auto", FakeProbe(H100))
    level, text = found_by(notes)
    assert level == "fail" and "local rank 1 has no GPU: this machine shows 1, expected 2" in text
    none = Notes("gpu")
    check_gpu(none, ALONE, "cuda", FakeProbe())
    assert found_by(none)[0] == "fail"
    on_cpu = Notes("gpu")
    check_gpu(on_cpu, ALONE, "auto", FakeProbe())
    assert on_cpu.facts["device"] == "cpu" and not on_cpu.found


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"free": 60 * 10**9}, "20.0 of 80.0 GB of GPU 0 are in use"),
        ({"errors": 3}, "GPU 0 counts 3 memory errors that ECC could not correct"),
        ({"ecc": "Disabled"}, "ECC of GPU 0 is disabled"),
    ],
)
def test_a_gpu_that_isnt_well_is_warned_of(change: dict[str, Any], text: str) -> None:
    well, ill = Notes("gpu"), Notes("gpu")
    check_gpu(well, ALONE, "auto", FakeProbe(H100))
    check_gpu(ill, ALONE, "auto", FakeProbe(H100._replace(**change)))
    assert well.found == [] and well.facts["gpu"]["name"] == "H100"
    assert found_by(ill)[0] == "warn" and text in found_by(ill)[1]


def test_nvidia_smi_is_read_by_device() -> None:
    answer = "GPU-aa, 570.1, Enabled, 2\nGPU-bb, 570.1, [N/A], [N/A]\n"
    assert read_smi(answer, "aa") == ("570.1", "Enabled", 2)
    assert read_smi(answer, "GPU-bb") == ("570.1", None, None)
    assert read_smi("NVIDIA-SMI has failed", "aa") == (None, None, None)


def gpu_reports(*gpus: Gpu | None) -> list[Report]:
    return reports(
        [
            {
                "gpu": {"device": "cpu"}
                if gpu is None
                else {"device": "cuda", "gpu": {**gpu._asdict(), "uuid": f"{rank}"}}
            }
            for rank, gpu in enumerate(gpus)
        ]
    )


def test_gpus_of_several_kinds_and_devices_are_told() -> None:
    same = gpu_reports(H100, H100, H100, H100)
    (line,) = compare_devices(same, hosts_of(same), UNKNOWN)
    assert line.level == "ok" and line.text == "4 x H100, capability 9.0, driver 570.1, ECC enabled, 79 GB free"
    mixed = gpu_reports(H100, H100, H100._replace(name="A100", free=39 * 10**9), H100._replace(name="A100"))
    found = told(compare_devices, mixed, UNKNOWN)
    assert only(found, "warn").text.startswith("the GPU is H100 on node1, A100 on node2")
    assert only(found, "ok").text.startswith("2 x H100, 2 x A100") and "39 GB to 79 GB free" in only(found, "ok").text
    half = gpu_reports(H100, H100, None, None)
    assert "the device is cuda on node1, cpu on node2" in texts(told(compare_devices, half, UNKNOWN), "fail")[0]
    none = gpu_reports(None, None)
    assert only(told(compare_devices, none, UNKNOWN), "ok").text == "none is used: trains on the CPU"


def test_two_ranks_on_one_gpu_fail() -> None:
    shared = gpu_reports(H100, H100, H100, H100)
    for report in shared[:2]:
        report.facts["gpu"]["gpu"]["uuid"] = "same"
    found = only(told(compare_devices, shared, UNKNOWN), "fail")
    assert found.ranks == (0, 1) and "share one GPU (same)" in found.text


def test_a_plan_that_doesnt_fit_is_warned_of() -> None:
    of = gpu_reports(H100, H100, H100, H100._replace(free=10 * 10**9))
    found = told(compare_devices, of, UNKNOWN._replace(memory=20 * 10**9))
    assert (
        only(found, "warn").ranks == (3,) and "the plan is 20 GB a rank, and 10 GB are free" in only(found, "warn").text
    )
    assert not texts(told(compare_devices, of, UNKNOWN._replace(memory=9 * 10**9)), "warn")


def test_restarts_need_their_switch() -> None:
    unset, right, alone = Notes("environment"), Notes("environment"), Notes("environment")
    under = {"TORCHELASTIC_RUN_ID": "1", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1", "NCCL_DEBUG": "INFO", "HOME": "/"}
    check_environment(unset, ALONE, under)
    assert found_by(unset)[0] == "warn" and f"export {RESTARTS_SWITCH}=1" in found_by(unset)[1]
    assert unset.facts["switches"] == {"NCCL_DEBUG": "INFO"}, "what torchrun sets is no switch of the user's"
    check_environment(right, ALONE, {**under, RESTARTS_SWITCH: "1"})
    check_environment(alone, ALONE, {})
    assert right.found == alone.found == []


def test_switches_that_must_be_the_same_are_compared() -> None:
    one = {"NCCL_P2P_DISABLE": "1", "NCCL_SOCKET_IFNAME": "eth0"}
    of = reports(
        [{"environment": {"switches": switches}} for switches in (one, one, {"NCCL_SOCKET_IFNAME": "eth1"})], hosts=3
    )
    found = told(compare_environments, of)
    assert "NCCL_P2P_DISABLE is 1 on node1, node2, not set on node3" in only(found, "warn").text
    assert only(found, "ok").text == "NCCL_P2P_DISABLE=1, NCCL_SOCKET_IFNAME=eth0"


def test_limits_of_files_and_shared_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (2048, 4096))
    few, many, container = Notes("limits"), Notes("limits"), Notes("limits")
    check_limits(few, ALONE, files=100, on_gpu=False, shm=tmp_path)
    assert few.found == [] and few.facts["shm_bytes"] > 0
    check_limits(many, ALONE, files=1000, on_gpu=False, shm=tmp_path / "none")
    assert found_by(many) == ("warn", "2048 files may be open, expected 4000 (1000 files of data): ulimit -n 4000")
    small = os.statvfs_result((4096, 4096, 16384, 16384, 16384, 100, 100, 100, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda _: small)
    check_limits(container, FIRST_OF_TWO_HOSTS, files=1, on_gpu=True, shm=tmp_path)
    assert "has 67 MB, expected 1 GB or more" in found_by(container)[1] and "--shm-size" in found_by(container)[1]
    on_cpu = Notes("limits")
    check_limits(on_cpu, FIRST_OF_TWO_HOSTS, files=1, on_gpu=False, shm=tmp_path)
    check_limits(on_cpu, ALONE, files=1, on_gpu=True, shm=tmp_path)
    assert on_cpu.found == []


def processor_reports(cores: int, threads: int, decoding: int, device: str = "cpu") -> list[Report]:
    facts = {"mask": list(range(cores)), "ranks": 2, "threads": threads, "data_threads": decoding}
    return reports({"processors": {**facts, "memory_available": 10**10}, "gpu": {"device": device}}, ranks=2, hosts=1)


@pytest.mark.parametrize(
    ("of", "warning"),
    [
        (processor_reports(8, 2, 2), None),
        (processor_reports(8, 1, 2), "4 processors a rank, and torch uses one thread"),
        (processor_reports(8, 8, 2), "4 processors a rank for 10 busy threads (2 of data.threads, 8 of torch)"),
        (processor_reports(8, 1, 2, "cuda"), None),
        (processor_reports(8, 8, 9, "cuda"), "4 processors a rank for 9 busy threads (9 of data.threads)"),
    ],
)
def test_threads_fit_the_processors(of: list[Report], warning: str | None) -> None:
    found = told(compare_processors, of, UNKNOWN)
    assert [text.startswith(warning or "-") for text in texts(found, "warn")] == [True] * (warning is not None)
    assert "for 2 ranks" in only(found, "ok").text


def test_memory_of_a_machine_is_for_all_its_ranks() -> None:
    of = processor_reports(8, 2, 2)
    found = told(compare_processors, of, UNKNOWN._replace(memory=6 * 10**9))
    assert "the plan is 6 GB for each of 2 ranks, and 10 GB are free" in only(found, "warn").text
    assert not texts(told(compare_processors, of, UNKNOWN._replace(memory=4 * 10**9)), "warn")


def test_this_machines_processors_and_versions() -> None:
    processors, versions = Notes("processors"), Notes("versions")
    check_processors(processors, ALONE, 3)
    check_versions(versions, FakeProbe())
    assert processors.facts["mask"] and processors.facts["data_threads"] == 3
    assert versions.facts["NCCL"] == "2.27.3" and versions.facts["torch"]


LOOPBACK = Interface("lo", "127.0.0.1", None, 65536)
ETH0 = Interface("eth0", "10.0.0.1", 25000, 1500)
DOCKER = Interface("docker0", "172.17.0.1", None, 1500)
IB0 = Interface("ib0", "10.1.0.1", 200000, 4092)
GOOD = Network((LOOPBACK, DOCKER, ETH0), ("10.0.0.1",), "10.0.0.1", ())


def look(network: Network, me: Identity = FIRST_OF_TWO_HOSTS, gpu: bool = False, **environ: str) -> Notes:
    notes = Notes("network")
    check_interfaces(notes, me, network, environ, on_gpu=gpu)
    return notes


def test_gloo_takes_what_the_host_name_means() -> None:
    good = look(GOOD)
    assert good.found == [] and good.facts["gloo"]["name"] == "eth0" and good.facts["gloo"]["how"] == "host name"
    debian = look(GOOD._replace(resolved=("127.0.1.1",)))
    level, text = found_by(debian)
    assert (
        level == "warn"
        and "gloo takes lo, which no other machine reaches, since the name node1 resolves to 127.0.1.1." in text
    )
    assert "export GLOO_SOCKET_IFNAME=eth0, or correct /etc/hosts" in text
    assert look(GOOD._replace(resolved=("127.0.1.1",)), ALONE).found == [], "alone the loopback does"
    six = GOOD._replace(interfaces=(LOOPBACK, ETH0._replace(others=("fd00::2",))), resolved=("fd00::2",))
    assert look(six).found == [] and look(six).facts["gloo"]["name"] == "eth0"
    named = look(GOOD._replace(resolved=("127.0.1.1",)), GLOO_SOCKET_IFNAME="eth0")
    assert named.found == [] and named.facts["gloo"]["how"] == "GLOO_SOCKET_IFNAME"


def test_a_name_that_means_nothing_and_an_interface_that_isnt_there() -> None:
    nothing = look(GOOD._replace(resolved=()))
    assert "the name node1 resolves to nothing, expected an address of this machine" in nothing.found[0][1]
    elsewhere = look(GOOD._replace(resolved=("10.9.9.9",)))
    assert "resolves to 10.9.9.9" in elsewhere.found[0][1]
    level, text = found_by(look(GOOD, GLOO_SOCKET_IFNAME="eth7"))
    assert level == "fail" and "GLOO_SOCKET_IFNAME is 'eth7', expected one of lo, docker0, eth0" in text
    level, text = found_by(look(GOOD, gpu=True, NCCL_SOCKET_IFNAME="ens"))
    assert level == "fail" and "NCCL_SOCKET_IFNAME is 'ens', which fits none of lo, docker0, eth0" in text


def test_nccl_takes_infiniband_first_and_docker_last() -> None:
    assert look(GOOD, gpu=True).facts["nccl"]["name"] == "eth0"
    fast = Network((LOOPBACK, DOCKER, ETH0, IB0), ("10.0.0.1",), None, ("mlx5_0",))
    assert look(fast, gpu=True).facts["nccl"]["name"] == "ib0"
    assert look(fast, gpu=True, NCCL_SOCKET_IFNAME="^ib,docker,lo").facts["nccl"]["name"] == "eth0"
    only_loopback = look(Network((LOOPBACK,), ("127.0.0.1",), None, ()), gpu=True)
    assert any("NCCL takes lo" in text for _, text in only_loopback.found)
    assert "nccl" not in look(GOOD).facts


@pytest.mark.parametrize(
    ("pattern", "chosen"),
    [
        ("eth", ["eth0", "eth1"]),
        ("=eth", []),
        ("=eth1,lo", ["lo", "eth1"]),
        ("^eth", ["lo"]),
        ("^=eth0", ["lo", "eth1"]),
    ],
)
def test_patterns_of_nccl(pattern: str, chosen: list[str]) -> None:
    assert select_interfaces(pattern, ["lo", "eth0", "eth1"]) == chosen


def test_a_low_mtu_and_unequal_links_are_warned_of() -> None:
    tunnel = GOOD._replace(interfaces=(LOOPBACK, ETH0._replace(mtu=1280)))
    assert "gloo takes eth0 with an MTU of 1280" in found_by(look(tunnel))[1]
    slow = look(GOOD._replace(interfaces=(LOOPBACK, ETH0._replace(speed=1000))))
    of = reports([{"network": one.facts} for one in (look(GOOD), look(GOOD), slow, slow)])
    found = told(compare_interfaces, of)
    assert "the link speed of what gloo takes is 25000 Mb/s on node1, 1000 Mb/s on node2" in only(found, "warn").text
    assert [finding.ranks for finding in found if finding.level == "ok"] == [(0, 1), (2, 3)]
    assert "gloo takes eth0 by host name (10.0.0.1, 25 Gb/s, MTU 1500)" in texts(found, "ok")
    astray = look(GOOD._replace(resolved=("127.0.1.1",)))
    of = reports([{"network": one.facts} for one in (look(GOOD), astray)])
    assert texts(told(compare_interfaces, of), "warn") == [], "the loopback's MTU is no advice"


def test_this_machines_network_is_read(tmp_path: Path) -> None:
    network = read_network("localhost", "127.0.0.1", tmp_path)
    assert network.route == "127.0.0.1" and network.rdma == ()
    loopback = network.at("127.0.1.1")
    assert loopback is not None and loopback.loopback and loopback.speed is None
    assert read_network("no.such.host.invalid", None, tmp_path).resolved == ()


def test_rank_0s_file_is_seen_in_the_same_folder_only(tmp_path: Path) -> None:
    token = Token(tmp_path / "runs")
    same, other = Notes("run folder"), Notes("run folder")
    check_shared(same, tmp_path / "runs", token.path.name, 0.0)
    (tmp_path / "others").mkdir()
    check_shared(other, tmp_path / "others", token.path.name, 0.0)
    assert same.found == []
    assert found_by(other)[0] == "fail" and "is another folder here than on rank 0" in found_by(other)[1]
    token.remove(same)
    assert list(tmp_path.iterdir()) == [tmp_path / "others"], "no trace is left"


def test_a_folder_that_was_there_stays(tmp_path: Path) -> None:
    Token(tmp_path).remove(Notes("run folder"))
    assert tmp_path.is_dir() and list(tmp_path.iterdir()) == []


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_folder_that_cant_be_written_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    good = perform("run folder", lambda notes: check_writing(notes, tmp_path), 30)
    assert good.found == [] and good.facts["free"] > 0 and good.facts["fsync"] > 0
    monkeypatch.setattr(os, call, full)
    bad = perform("run folder", lambda notes: check_writing(notes, tmp_path), 30)
    monkeypatch.undo()
    assert found_by(bad) == ("fail", "No space left on device: check the path and its permissions")
    assert list(tmp_path.iterdir()) == []


def folder_reports(free: int, inodes: int | None = 10**6) -> list[Report]:
    return reports({"run folder": {"folder": "/runs", "free": free, "inodes": inodes, "fsync": 0.01}})


def test_room_for_commits() -> None:
    needs = UNKNOWN._replace(state=10**9)
    enough, tight, none = (folder_reports(free) for free in (5 * 10**9, 2 * 10**9, 10**8))
    found = told(compare_run_folders, enough, needs)
    assert only(found, "ok").text == "/runs: 5 GB free, 4 commits take 4 GB; fsync 10 ms" and len(found) == 1
    text = "2 GB are free, 4 commits of 1 GB take 4 GB: free space"
    assert texts(told(compare_run_folders, tight, needs), "warn")[0].startswith(text)
    assert len(texts(told(compare_run_folders, none, needs), "fail")) == 4
    few = folder_reports(5 * 10**9, 10)
    assert "10 files can still be made, commits take 32" in texts(told(compare_run_folders, few, needs), "fail")[0]
    endless = folder_reports(5 * 10**9, None)
    assert "is unknown without data.num_classes" in only(told(compare_run_folders, endless, UNKNOWN), "ok").text


def make_records(folder: Path, size: int = 3 << 20, index: bool = True) -> Path:
    folder.mkdir()
    (folder / "train.rec").write_bytes(bytes(size))
    if index:
        (folder / "train.idx").write_text("0\t0\n")
    (folder / "property").write_text("1000,112,112")
    return folder


def no_sets() -> dict[str, Path]:
    return {}


def look_at_data(path: Path | str, verification: Callable[[], dict[str, Path]] = no_sets) -> Notes:
    sources = [Source(str(path), "auto", None)]
    return perform("data", lambda notes: check_data(notes, ALONE, sources, verification), 30)


def test_what_a_data_set_is_made_of(tmp_path: Path) -> None:
    notes = look_at_data(make_records(tmp_path / "a"), lambda: {"lfw": tmp_path / "a" / "property"})
    (facts,) = notes.facts["sets"]
    assert notes.found == [] and facts["format"] == "recordio" and facts["files"] == 2 and facts["classes"] == 1000
    assert notes.facts["read"] > 0 and notes.facts["verification"] == {"lfw": 12}
    for name in ("amy", "bob", "eve"):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "1.jpg").write_bytes(b"\xff\xd8\xff")
    (facts,) = look_at_data(tmp_path / "images").facts["sets"]
    assert facts["format"] == "folder" and facts["files"] == facts["classes"] == 3


def test_data_that_arent_there(tmp_path: Path) -> None:
    assert "can't read the data set" in found_by(look_at_data(tmp_path / "none"))[1]
    without = look_at_data(make_records(tmp_path / "b", index=False))
    assert "train.idx: No such file or directory: copy the data set's files again" in found_by(without)[1]

    def missing() -> dict[str, Path]:
        raise ConfigError("evaluate.sets names 'lfw.bin', but it is no file")

    assert found_by(look_at_data(make_records(tmp_path / "c"), missing))[1].startswith("evaluate.sets names 'lfw.bin'")


def test_data_that_differ_between_machines(tmp_path: Path) -> None:
    one = look_at_data(make_records(tmp_path / "a"), lambda: {"lfw": tmp_path / "a" / "property"}).facts
    two = look_at_data(make_records(tmp_path / "b", 2 << 20), lambda: {"lfw": tmp_path / "b" / "train.rec"}).facts
    of = reports([{"data": one}, {"data": two}])
    found = told(compare_data, of)
    data, verification = texts(found, "fail")
    assert one["sets"][0]["digest"] != two["sets"][0]["digest"]
    assert "recordio, 2 files, 3.15 MB, 1,000 classes" in data and "on node1" in data and "on node2" in data
    assert verification.startswith("the verification set lfw has 12 bytes on node1, 2097152 bytes on node2")
    same = reports([{"data": one}, {"data": one}])
    assert {finding.level for finding in compare_data(same, hosts_of(same))} == {"ok"}


def test_what_is_in_order_is_so_on_the_other_ranks() -> None:
    one = {"path": "/faces", "format": "recordio", "files": 2, "bytes": 10, "digest": "a", "classes": 24}
    whole = {"data": {"sets": [one], "verification": {"demo_val": 5}}, "environment": {"switches": {"A": "1"}}}
    of = reports([whole, {**whole, "data": {"sets": []}}, {**whole, "data": {"sets": [one]}}], hosts=1)
    for rank, text in ((1, "/faces: can't read the data set"), (2, "demo_val is not there")):
        of[rank].found.append(("data", "fail", text))
    of[1].found.append(("environment", "warn", "a switch"))
    found = compare_all(of, hosts_of(of), UNKNOWN)
    assert [(one.text.split(",")[0], one.ranks) for one in found if one.check == "data"] == [
        ("/faces: recordio", (0, 2)),
        ("verification: demo_val", (0,)),
    ]
    assert only([one for one in found if one.check == "environment"], "ok").ranks == ()
    of[1].found.append(("environment", "fail", "broken"))
    assert only([one for one in compare_all(of, hosts_of(of), UNKNOWN) if one.check == "environment"], "ok").ranks == (
        0,
        2,
    )
    other = {**one, "digest": "b"}
    of = reports([{"data": {"sets": [one]}}, {"data": {"sets": [one]}}, {"data": {"sets": [other]}}], hosts=1)
    assert only(told(compare_data, of), "ok").ranks == (0, 1) and only(told(compare_data, of), "fail").ranks == ()
    # The first rank has none.
    of = reports([{"data": {"sets": []}}, {"data": {"sets": [one]}}], hosts=1)
    assert only(told(compare_data, of), "ok").ranks == (1,)


def test_versions_and_configurations_that_differ() -> None:
    versions = [{"torch": "2.13", "python": "3.11", "DALI": None}, {"torch": "2.12", "python": "3.10", "DALI": None}]
    of = reports([{"versions": one} for one in versions])
    found = told(compare_versions, of)
    assert only(found, "fail").text == "torch is 2.13 on node1, 2.12 on node2: install the same everywhere"
    assert only(found, "warn").text.startswith("python is 3.11 on node1, 3.10 on node2")
    of = reports([{"configuration": {"train.seed": seed, "train.steps": 5}} for seed in (0, 0, 1)], hosts=3)
    found = told(compare_configurations, of)
    assert [finding.level for finding in found] == ["fail"]
    assert found[0].text.startswith("train.seed is 0 on node1, node2, 1 on node3: start every machine with the same")


def links(*seconds: float, ahead: float = 0.0) -> dict[int, dict[str, Any]]:
    kind = {"bytes": 10**8, "seconds": 0.1, "latency": 1e-4}
    clock = {str(rank): (ahead if rank == 1 else 0.0, 1e-4) for rank in range(1, len(seconds))}
    return {
        rank: {"all_reduce": kind, "all_gather": kind, "ring": {"bytes": 10**7, "seconds": one}, "clock": clock}
        for rank, one in enumerate(seconds)
    }


def test_the_slow_link_is_named() -> None:
    """A slow link from 1 to 2 slows both ends; no other is blamed."""
    one_host = hosts_of(reports({}, ranks=5, hosts=1))
    found = list(compare_links(links(0.01, 0.09, 0.09, 0.01, 0.01), one_host, UNKNOWN))
    assert only(found, "warn").ranks == (1, 2)
    assert only(found, "warn").text.startswith("from rank 1 to rank 2: 0.111 GB/s, the median is 1")
    assert not texts(list(compare_links(links(0.01, 0.02, 0.02, 0.01, 0.01), one_host, UNKNOWN)), "warn")


def test_links_between_machines_are_compared_with_each_other() -> None:
    two_hosts = hosts_of(reports({}, ranks=4, hosts=2))
    found = list(compare_links(links(0.09, 0.09, 0.09, 0.09), two_hosts, UNKNOWN))
    assert not texts(found, "warn")
    assert [text.split(",")[0] for text in texts(found, "ok") if "machines" in text] == [
        "2 within machines",
        "2 between machines",
    ]


def test_clocks_that_are_apart_and_the_time_of_a_step() -> None:
    hosts = hosts_of(reports({}, ranks=2, hosts=2))
    found = list(compare_links(links(0.01, 0.01, ahead=-7.5), hosts, UNKNOWN._replace(sent={"embeddings": 10**7})))
    assert only(found, "warn") == Finding(
        "warn",
        "clocks",
        "the clock is 7.5 s behind rank 0's: start a time service (chrony, systemd-timesyncd)",
        (1,),
    )
    assert step_estimate(links(0.1)[0], {"embeddings": 10**7, "labels": 8}).endswith(
        "about 10.1 ms, embeddings 10 ms of them"
    )
    assert list(compare_links({0: {}}, hosts, UNKNOWN)) == []


def some_findings() -> tuple[list[Finding], Hosts]:
    of = reports({"configuration": {"train.seed": 0}, "versions": {"torch": "2.13"}})
    findings = compare_all(of, hosts_of(of), UNKNOWN)
    findings.append(Finding("fail", "data", "/very/long/path/" + "x" * 150 + ": [bold]no[/bold] such\nfile", (3,)))
    findings.append(Finding("warn", "ranks", "late", (1,)))
    return findings, hosts_of(of)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_table_fits_the_terminal(width: int) -> None:
    findings, hosts = some_findings()
    console = Console(
        file=io.StringIO(), width=width, force_terminal=True, no_color=True, highlight=False, color_system=None
    )
    show("job: 4 ranks", findings, hosts, console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= width
    assert lines[0] == "job: 4 ranks" and lines[-1] == "1 problem, 1 warning"
    assert any("rank 3 (node2)" in line for line in lines) and any("[bold]no[/bold]" in line for line in lines)


def test_without_a_terminal_a_finding_is_a_line() -> None:
    findings, hosts = some_findings()
    console = Console(file=io.StringIO(), width=40)
    show("job: 4 ranks", findings, hosts, console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) == len(findings) + 2
    assert lines[1] == "warn ranks         rank 1 (node1): late"
    assert any(
        line.startswith("fail data          rank 3 (node2): /very") and line.endswith("[/bold] such file")
        for line in lines
    )


def test_the_verdict_and_the_order() -> None:
    ok, warn, fail = (Finding(level, "data", "") for level in ("ok", "warn", "fail"))
    assert verdict([ok]) == "ready" and verdict([ok, warn, warn]) == "ready, 2 warnings"
    assert verdict([fail, warn]) == "1 problem, 1 warning" and verdict([fail, fail]) == "2 problems"
    assert [finding.level for finding in in_order([ok, warn, fail])] == ["fail", "warn", "ok"]
    assert len(set(CHECKS)) == len(CHECKS)


def test_json_has_all_of_it(tmp_path: Path) -> None:
    findings, _ = some_findings()
    write_json(tmp_path / "out.json", findings, reports({}), {0: {"links": {}}})
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["ready"] is False and len(content["findings"]) == len(findings) and len(content["ranks"]) == 4
    with pytest.raises(ConfigError, match="--json .*: Is a directory, expected a file that can be written"):
        write_json(tmp_path, findings, [], {})


def test_what_machines_have_alike_is_one_finding() -> None:
    facts = {"mask": [0, 1], "ranks": 2, "threads": 1, "data_threads": 1, "memory_available": 10**10}
    of = reports({"processors": facts, "gpu": {"device": "cpu"}})
    (found,) = [finding for finding in compare_all(of, hosts_of(of), UNKNOWN) if finding.check == "processors"]
    assert found.ranks == (0, 1, 2, 3)
