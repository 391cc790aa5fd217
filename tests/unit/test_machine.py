from __future__ import annotations

import socket
from pathlib import Path

import pytest

from partial_fc.machine import HostMemory, addresses_towards, host_memory, processors

MEMINFO = "MemTotal:       1000 kB\nMemFree:         100 kB\nMemAvailable:    600 kB\nHugePages_Total:       0\n"
KB = 1024


def machine(root: Path, *, cgroup: str = "", files: dict[str, str] | None = None, meminfo: str = MEMINFO) -> Path:
    contents = {"proc/meminfo": meminfo, "proc/self/cgroup": cgroup, **(files or {})}
    for name, text in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def group(place: str, limit: str, used: int, cache: int) -> dict[str, str]:
    return {
        f"{place}/memory.max": f"{limit}\n",
        f"{place}/memory.current": f"{used}\n",
        f"{place}/memory.stat": f"anon 5\ninactive_file {cache}\n",
    }


def test_this_machine_says_what_it_has():
    memory = host_memory()
    assert memory is not None and 0 < memory.available <= memory.limit
    assert processors() >= 1


def test_without_a_group_the_machine_counts(tmp_path: Path):
    assert host_memory(machine(tmp_path)) == HostMemory(600 * KB, 1000 * KB)


def test_a_group_lowers_both_and_its_file_cache_is_free(tmp_path: Path):
    files = group("sys/fs/cgroup/job/step", "300000", 200000, 50000)
    found = host_memory(machine(tmp_path, cgroup="0::/job/step\n", files=files))
    assert found == HostMemory(150000, 300000)


def test_the_tightest_group_around_counts(tmp_path: Path):
    files = {
        **group("sys/fs/cgroup/job/step", "max", 1, 0),
        **group("sys/fs/cgroup/job", "200000", 190000, 0),
    }
    found = host_memory(machine(tmp_path, cgroup="0::/job/step\n", files=files))
    assert found == HostMemory(10000, 200000)


def test_in_a_container_its_own_folder_is_the_top(tmp_path: Path):
    # The path is that of the machine, which isn't there in the container.
    files = group("sys/fs/cgroup", "400000", 100000, 0)
    found = host_memory(machine(tmp_path, cgroup="0::/kubepods/pod1/abc\n", files=files))
    assert found == HostMemory(300000, 400000)


def test_the_older_interface_is_known(tmp_path: Path):
    place = "sys/fs/cgroup/memory/job"
    files = {
        f"{place}/memory.limit_in_bytes": "500000\n",
        f"{place}/memory.usage_in_bytes": "450000\n",
        f"{place}/memory.stat": "total_inactive_file 150000\n",
    }
    found = host_memory(machine(tmp_path, cgroup="5:memory,hugetlb:/job\n3:cpu:/job\n", files=files))
    assert found == HostMemory(200000, 500000)


def test_a_group_that_used_more_than_its_limit_has_nothing_left(tmp_path: Path):
    files = group("sys/fs/cgroup/job", "100000", 120000, 0)
    found = host_memory(machine(tmp_path, cgroup="0::/job\n", files=files))
    assert found == HostMemory(0, 100000)


@pytest.mark.parametrize("meminfo", ["", "MemTotal: x kB\n", "MemTotal:\n", "nothing"])
def test_a_system_that_does_not_say_has_none(tmp_path: Path, meminfo: str):
    assert host_memory(machine(tmp_path, meminfo=meminfo)) is None
    assert host_memory(tmp_path / "nowhere") is None


@pytest.mark.parametrize("cgroup", ["", "x", "0::", "::::\n", "0::/../..\n"])
def test_odd_groups_are_passed_over(tmp_path: Path, cgroup: str):
    assert host_memory(machine(tmp_path, cgroup=cgroup)) == HostMemory(600 * KB, 1000 * KB)


def test_the_way_to_this_machine_begins_at_its_loopback():
    assert list(addresses_towards("127.0.0.1")) == ["127.0.0.1"]
    assert list(addresses_towards("127.0.0.1", [socket.AF_INET6, socket.AF_INET])) == ["127.0.0.1"]


@pytest.mark.parametrize("host", ["a..b", "no-such-host.invalid", "x" * 300])
def test_to_what_is_no_host_there_is_no_way(host: str):
    assert list(addresses_towards(host)) == []
