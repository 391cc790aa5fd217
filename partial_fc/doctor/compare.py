"""What rank 0 makes of the reports: what ranks must have in common, and a line for what is in order."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from partial_fc.doctor.findings import Finding, Hosts, Level, Report, gather_by_value
from partial_fc.doctor.machine import may_differ

# Without these in common a job doesn't run, or computes something else on some ranks.
_MUST_AGREE = ("partial_fc", "torch", "CUDA", "NCCL")
_SKEW_SECONDS = 1.0
_SLOW_LINK = 3.0
_GB = 10**9


class Needs(NamedTuple):
    """What the configured run takes; None: unknown, because the number of classes is.

    Attributes:
        classes: C.
        state: bytes of a commit.
        memory: bytes of the fullest rank.
        commits: how many commits there are at once, at most.
        sent: bytes of the tensor of each collective of a step.
    """

    classes: int | None
    state: int | None
    memory: int | None
    commits: int
    sent: Mapping[str, int]


def facts_of(reports: Sequence[Report], check: str, key: str) -> dict[int, Any]:
    """A fact by rank, of those that know it."""
    found = {report.rank: report.facts.get(check, {}).get(key) for report in reports}
    return {rank: value for rank, value in found.items() if value is not None}


def compare_configurations(reports: Sequence[Report], hosts: Hosts) -> Iterator[Finding]:
    """The resolved configuration, key by key."""
    values = {report.rank: report.facts.get("configuration", {}) for report in reports}
    values = {rank: value for rank, value in values.items() if value}
    keys = dict.fromkeys(key for value in values.values() for key in value)
    differing = 0
    for key in keys:
        groups = gather_by_value({rank: value.get(key) for rank, value in values.items()})
        if len(groups) > 1:
            differing += 1
            shown = _by_group(groups, hosts)
            text = f"{key} is {shown}: start every machine with the same file and overrides"
            yield Finding("fail", "configuration", text)
    if values and not differing and len(values) == len(reports):
        yield Finding("ok", "configuration", f"{len(keys)} keys{', the same everywhere' * (len(values) > 1)}")


def compare_versions(reports: Sequence[Report], hosts: Hosts) -> Iterator[Finding]:
    """Versions of the software."""
    same = []
    names = dict.fromkeys(name for report in reports for name in report.facts.get("versions", {}))
    for name in names:
        groups = gather_by_value({report.rank: report.facts.get("versions", {}).get(name) for report in reports})
        if len(groups) > 1:
            level: Level = "fail" if name in _MUST_AGREE else "warn"
            yield Finding(level, "versions", f"{name} is {_by_group(groups, hosts)}: install the same everywhere")
        elif groups[0][0] is not None:
            same.append(f"{name} {groups[0][0]}")
    if same:
        yield Finding("ok", "versions", ", ".join(same))


def compare_environments(reports: Sequence[Report], hosts: Hosts) -> Iterator[Finding]:
    """Switches of the environment."""
    values = facts_of(reports, "environment", "switches")
    for name in sorted({name for switches in values.values() for name in switches}):
        groups = gather_by_value({rank: switches.get(name) for rank, switches in values.items()})
        if len(groups) > 1 and not may_differ(name):
            text = f"{name} is {_by_group(groups, hosts, none='not set')}: export the same everywhere"
            yield Finding("warn", "environment", text)
    # Only those of the first rank: where others differ, that is said above.
    shown = ", ".join(f"{name}={value}" for name, value in values.get(0, {}).items())
    if values:
        yield Finding("ok", "environment", shown or "no switch of NCCL, gloo or torch is set")


def compare_devices(reports: Sequence[Report], hosts: Hosts, needs: Needs) -> Iterator[Finding]:
    """GPUs, or the lack of them."""
    devices = gather_by_value(facts_of(reports, "gpu", "device"))
    if len(devices) > 1:
        yield Finding(
            "fail", "gpu", f"the device is {_by_group(devices, hosts)}: set train.device, or repair the drivers"
        )
    gpus = facts_of(reports, "gpu", "gpu")
    for key, what in (("name", "the GPU"), ("capability", "the compute capability"), ("driver", "the driver")):
        groups = gather_by_value({rank: gpu[key] for rank, gpu in gpus.items()})
        if len(groups) > 1:
            text = f"{what} is {_by_group(groups, hosts)}: every step waits for the slowest, use machines of one kind"
            yield Finding("warn", "gpu", text)
    for node in hosts.nodes:
        for uuid, ranks in gather_by_value({rank: gpus[rank]["uuid"] for rank in hosts.ranks(node) if rank in gpus}):
            if len(ranks) > 1:
                text = f"these ranks share one GPU ({uuid}): see CUDA_VISIBLE_DEVICES, NCCL wants one for each rank"
                yield Finding("fail", "gpu", text, ranks)
    if gpus:
        yield from _gpu_memory(gpus, needs)
    elif [device for device, _ in devices] == ["cpu"]:
        yield Finding("ok", "gpu", "none is used: trains on the CPU")


def _gpu_memory(gpus: Mapping[int, Mapping[str, Any]], needs: Needs) -> Iterator[Finding]:
    least = min(gpu["free"] for gpu in gpus.values())
    if needs.memory is not None and needs.memory > least:
        tight = tuple(rank for rank, gpu in gpus.items() if gpu["free"] < needs.memory)
        text = (
            f"the plan is {_size(needs.memory)} a rank, and {_size(least)} are free: see partial-fc plan, and lower "
            "train.batch_size or take more ranks"
        )
        yield Finding("warn", "gpu", text, tight)
    first = next(iter(gpus.values()))
    kinds = ", ".join(
        f"{len(ranks)} x {name}" for name, ranks in gather_by_value({rank: gpu["name"] for rank, gpu in gpus.items()})
    )
    details = f"capability {first['capability']}" + (f", driver {first['driver']}" if first["driver"] else "")
    details += f", ECC {first['ecc'].lower()}" if first["ecc"] else ""
    planned = f"; the plan is {_size(needs.memory)} a rank" if needs.memory is not None else ""
    yield Finding("ok", "gpu", f"{kinds}, {details}, {_range([gpu['free'] for gpu in gpus.values()])} free{planned}")


def compare_processors(reports: Sequence[Report], hosts: Hosts, needs: Needs) -> Iterator[Finding]:
    """Processors and threads of each machine's ranks; memory where they train on the CPU."""
    for node in hosts.nodes:
        ranks = hosts.ranks(node)
        known = [
            report.facts["processors"] for report in reports if report.rank in ranks and report.facts.get("processors")
        ]
        if not known:
            continue
        on_cpu = all(report.facts.get("gpu", {}).get("device") == "cpu" for report in reports if report.rank in ranks)
        cores = len({core for facts in known for core in facts["mask"]})
        count = max(facts["ranks"] for facts in known)
        each = cores / count
        threads, decoding = max(facts["threads"] for facts in known), max(facts["data_threads"] for facts in known)
        busy = decoding + (threads if on_cpu else 0)
        if busy > max(2 * each, 2):
            of_torch = f", {threads} of torch" if on_cpu else ""
            text = (
                f"{each:.3g} processors a rank for {busy} busy threads ({decoding} of data.threads{of_torch}): "
                "lower data.threads or OMP_NUM_THREADS, or start fewer ranks"
            )
            yield Finding("warn", "processors", text, ranks)
        elif on_cpu and threads == 1 and each >= 2:
            text = (
                f"{each:.3g} processors a rank, and torch uses one thread (torchrun's default): "
                f"export OMP_NUM_THREADS={int(each)}"
            )
            yield Finding("warn", "processors", text, ranks)
        least = min((facts["memory_available"] for facts in known if facts["memory_available"]), default=None)
        if on_cpu and least is not None and needs.memory is not None and needs.memory * count > least:
            text = (
                f"the plan is {_size(needs.memory)} for each of {count} ranks, and {_size(least)} are free: see "
                "partial-fc plan, and lower train.batch_size or take more machines"
            )
            yield Finding("warn", "processors", text, ranks)
        memory = f", {_size(least)} of memory free" if least is not None else ""
        text = f"{cores} for {count} rank{'s' * (count > 1)}, {threads} torch + {decoding} data threads each{memory}"
        yield Finding("ok", "processors", text, ranks)


def compare_interfaces(reports: Sequence[Report], hosts: Hosts) -> Iterator[Finding]:
    """What gloo and NCCL take on each machine."""
    for kind, name in (("gloo", "gloo"), ("nccl", "NCCL")):
        chosen = facts_of(reports, "network", kind)
        for key, unit in (("speed", " Mb/s"), ("mtu", "")):
            known = {rank: one[key] for rank, one in chosen.items() if one[key] and not one["loopback"]}
            groups = gather_by_value(known)
            if len(groups) > 1 and len(hosts.nodes) > 1:
                what = "link speed" if key == "speed" else "MTU"
                shown = _by_group(groups, hosts, unit=unit)
                text = f"the {what} of what {name} takes is {shown}: expected the same everywhere, see ip link"
                yield Finding("warn", "network", text)
        for text, ranks in gather_by_value({rank: f"{name} takes {_describe(one)}" for rank, one in chosen.items()}):
            yield Finding("ok", "network", text, ranks)


def _describe(one: Mapping[str, Any]) -> str:
    if not one["name"]:
        return "no interface"
    parts = [f"{one['address'] or 'no address'}"]
    if one["speed"]:
        parts.append(f"{one['speed'] / 1000:g} Gb/s")
    if one["mtu"]:
        parts.append(f"MTU {one['mtu']}")
    rdma = f", and RDMA by {', '.join(one['rdma'])}" if one.get("rdma") else ""
    how = f" by {one['how']}" if one.get("how") else ""
    return f"{one['name']}{how} ({', '.join(parts)}){rdma}"


def compare_run_folders(reports: Sequence[Report], hosts: Hosts, needs: Needs) -> Iterator[Finding]:
    """Room for the commits."""
    free, inodes = facts_of(reports, "run folder", "free"), facts_of(reports, "run folder", "inodes")
    fsync, folders = facts_of(reports, "run folder", "fsync"), facts_of(reports, "run folder", "folder")
    # What torch.distributed.checkpoint writes of a rank, and what belongs to a commit as a whole.
    files = needs.commits * (len(reports) + 4)
    for rank, count in inodes.items():
        if count < files:
            text = f"{count} files can still be made, commits take {files}: delete files of old runs"
            yield Finding("fail", "run folder", text, (rank,))
    if needs.state is not None:
        wanted = needs.commits * needs.state
        for rank, size in free.items():
            if size < wanted:
                text = (
                    f"{_size(size)} are free, {needs.commits} commits of {_size(needs.state)} take {_size(wanted)}: "
                    "free space, set train.run_dir to a larger file system, or lower checkpoint.keep_last"
                )
                yield Finding("fail" if size < needs.state else "warn", "run folder", text, (rank,))
    if fsync and free:
        takes = (
            f"{needs.commits} commits take {_size(needs.commits * needs.state)}"
            if needs.state is not None
            else ("what commits take is unknown without data.num_classes")
        )
        folder = next(iter(folders.values()))
        text = f"{folder}: {_size(min(free.values()))} free, {takes}; fsync {_range_ms(list(fsync.values()))}"
        yield Finding("ok", "run folder", text, tuple(free) if len(hosts.nodes) > 1 else ())


def compare_data(reports: Sequence[Report], hosts: Hosts) -> Iterator[Finding]:
    """The data sets, which must be the same files everywhere."""
    of_rank = facts_of(reports, "data", "sets")
    for number in range(max(map(len, of_rank.values()), default=0)):
        sets = {rank: sets[number] for rank, sets in of_rank.items() if number < len(sets)}
        groups = gather_by_value({rank: _contents(one) for rank, one in sets.items()})
        if len(groups) > 1:
            text = f"{sets[min(sets)]['path']} is {_by_group(groups, hosts)}: copy the data set again where it differs"
            yield Finding("fail", "data", text)
    sizes = facts_of(reports, "data", "verification")
    for name in dict.fromkeys(name for known in sizes.values() for name in known):
        groups = gather_by_value({rank: known.get(name) for rank, known in sizes.items()})
        if len(groups) > 1:
            text = f"the verification set {name} has {_by_group(groups, hosts, unit=' bytes')}: copy it again"
            yield Finding("fail", "data", text)
    speeds = list(facts_of(reports, "data", "read").values())
    speed = f", read at {_span([f'{value:,.0f}' for value in (min(speeds), max(speeds))])} MB/s" if speeds else ""
    for number in range(max(map(len, of_rank.values()), default=0)):
        # Those of the first rank that has the set: where others differ, that is said above.
        (path, contents), ranks = gather_by_value(
            {
                rank: (sets[number]["path"], _contents(sets[number]))
                for rank, sets in of_rank.items()
                if number < len(sets)
            }
        )[0]
        yield Finding("ok", "data", f"{path}: {contents.split(' [')[0]}{speed if number == 0 else ''}", ranks)
    for known, ranks in gather_by_value(sizes)[:1]:
        if known:
            yield Finding("ok", "data", f"verification: {', '.join(known)}", ranks)


def _contents(one: Mapping[str, Any]) -> str:
    classes = f", {one['classes']:,} classes" if one["classes"] else ""
    unit = "folder" if one["format"] == "folder" else "file"
    size = f", {_size(one['bytes'])}" if one["bytes"] else ""
    count = f"{one['files']:,} {unit}{'s' * (one['files'] != 1)}"
    return f"{one['format']}, {count}{size}{classes} [{one['digest']}]"


def compare_links(measured: Mapping[int, Mapping[str, Any]], hosts: Hosts, needs: Needs) -> Iterator[Finding]:
    """Bandwidth, the slowest neighbours, and clocks.

    Args:
        measured: what ``measure_links`` returned, by rank.
        hosts: names.
        needs: of the configured run.
    """
    mine = measured.get(0, {})
    if not mine:
        return
    for name in ("all_reduce", "all_gather"):
        one = mine[name]
        text = (
            f"{name.replace('_', '-')} of {_size(one['bytes'])}: {one['bytes'] / one['seconds'] / _GB:.3g} GB/s; "
            f"of 4 kB: {one['latency'] * 1e6:.0f} us"
        )
        yield Finding("ok", "bandwidth", text)
    if needs.sent:
        yield Finding("ok", "bandwidth", step_estimate(mine, needs.sent))
    yield from _slow_links(measured, hosts)
    yield from _clocks(mine["clock"])


def step_estimate(mine: Mapping[str, Any], sent: Mapping[str, int]) -> str:
    """What the collectives of a step would take at the measured speeds."""
    seconds = {}
    for name, size in sent.items():
        kind = mine["all_reduce" if name in ("target_cosines", "backbone_gradient") else "all_gather"]
        seconds[name] = max(kind["latency"], size * kind["seconds"] / kind["bytes"])
    longest = max(seconds, key=lambda name: seconds[name])
    return (
        f"a step's collectives ({_size(sum(sent.values()))}) would take about {sum(seconds.values()) * 1e3:.3g} ms, "
        f"{longest.replace('_', ' ')} {seconds[longest] * 1e3:.3g} ms of them"
    )


def _slow_links(measured: Mapping[int, Mapping[str, Any]], hosts: Hosts) -> Iterator[Finding]:
    """Links of the ring, within machines and between them apart.

    A rank's time is that of its sending and its receiving together, so that a slow link slows two ranks: the time of a
    link is the smaller one of its two ends'.
    """
    ranks = sorted(measured)
    times = {rank: measured[rank]["ring"]["seconds"] for rank in ranks}
    size = measured[ranks[0]]["ring"]["bytes"]
    kinds: dict[bool, dict[tuple[int, int], float]] = {True: {}, False: {}}
    for here, there in zip(ranks, [*ranks[1:], ranks[0]], strict=True):
        kinds[hosts.node(here) == hosts.node(there)][here, there] = min(times[here], times[there])
    for within, links in kinds.items():
        if not links:
            continue
        median = statistics.median(links.values())
        for (here, there), seconds in links.items():
            if seconds > _SLOW_LINK * median:
                text = (
                    f"from rank {here} to rank {there}: {size / seconds / _GB:.3g} GB/s, the median is "
                    f"{size / median / _GB:.3g}: see that link's cable, port and driver (ethtool, nvidia-smi topo -m)"
                )
                yield Finding("warn", "links", text, (here, there))
        (here, there), slowest = max(links.items(), key=lambda link: link[1])
        where = "within machines" if within else "between machines"
        text = (
            f"{len(links)} {where}, all at once: median {size / median / _GB:.3g} GB/s, slowest "
            f"{size / slowest / _GB:.3g} ({here} to {there})"
        )
        yield Finding("ok", "links", text)


def _clocks(clocks: Mapping[str, Sequence[float]]) -> Iterator[Finding]:
    ahead = {int(rank): offset for rank, (offset, _) in clocks.items()}
    for rank, offset in ahead.items():
        if abs(offset) > _SKEW_SECONDS:
            way = "ahead of" if offset > 0 else "behind"
            text = f"the clock is {abs(offset):.1f} s {way} rank 0's: start a time service (chrony, systemd-timesyncd)"
            yield Finding("warn", "clocks", text, (rank,))
    if ahead:
        most = max(map(abs, ahead.values()))
        trips = max(trip for _, trip in clocks.values())
        text = f"at most {most * 1e3:.3g} ms apart (round trips of up to {trips * 1e6:.0f} us)"
        yield Finding("ok", "clocks", text)


def compare_all(reports: Sequence[Report], hosts: Hosts, needs: Needs) -> list[Finding]:
    """All that can be said before ranks talk to each other; what several machines have alike is one finding."""
    compared: list[Callable[[], Iterator[Finding]]] = [
        lambda: compare_configurations(reports, hosts),
        lambda: compare_versions(reports, hosts),
        lambda: compare_environments(reports, hosts),
        lambda: compare_devices(reports, hosts, needs),
        lambda: compare_processors(reports, hosts, needs),
        lambda: compare_interfaces(reports, hosts),
        lambda: compare_run_folders(reports, hosts, needs),
        lambda: compare_data(reports, hosts),
    ]
    failed = {(check, report.rank) for report in reports for check, level, _ in report.found if level == "fail"}
    ranks: dict[Finding, list[int]] = {}
    for finding in (finding for compare in compared for finding in compare()):
        on = finding.ranks
        if finding.level == "ok" and not on and any(check == finding.check for check, _ in failed):
            on = tuple(report.rank for report in reports if (finding.check, report.rank) not in failed)
            if not on:
                # Nothing is in order on no rank.
                continue
        ranks.setdefault(finding._replace(ranks=()), []).extend(on)
    return [finding._replace(ranks=tuple(sorted(on))) for finding, on in ranks.items()]


def _by_group(groups: Sequence[tuple[Any, Sequence[int]]], hosts: Hosts, unit: str = "", none: str = "missing") -> str:
    """``2.12 on node2, 2.13 on ranks 0-3 (node1)``."""
    shown = [f"{none if value is None else f'{value}{unit}'} on {hosts.describe(ranks)}" for value, ranks in groups]
    return ", ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "")


def _size(size: float) -> str:
    """Three digits and a decimal unit."""
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}" if size < 100 * factor else f"{size / factor:,.0f} {unit}"
    return f"{size:.0f} B"


def _range(sizes: Sequence[int]) -> str:
    return _span([_size(min(sizes)), _size(max(sizes))])


def _range_ms(seconds: Sequence[float]) -> str:
    return f"{_span([f'{value * 1e3:.3g}' for value in (min(seconds), max(seconds))])} ms"


def _span(ends: Sequence[str]) -> str:
    return ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"
