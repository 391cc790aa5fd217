"""The preflight: what could go wrong in a job is looked up on every rank before the job runs.

Each rank looks at its own machine and tells rank 0 through the job's store, which works before there is a process group
and where none can be made. Then they join, and measure what is between them. A file imports only from files before it,
in the order of ``tests/test_layers.py``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from partial_fc import footprint
from partial_fc.chunks import cpu_cache
from partial_fc.config import Config, load_config
from partial_fc.doctor.board import Board, Ended, Ending, cut_off, open_board, presence
from partial_fc.doctor.compare import Needs, compare_all, compare_links
from partial_fc.doctor.findings import (
    Finding,
    Hosts,
    Identity,
    Notes,
    Report,
    merge,
    perform,
    read_identity,
)
from partial_fc.doctor.interfaces import check_interfaces, master_address, read_network
from partial_fc.doctor.links import measure_links
from partial_fc.doctor.machine import (
    CudaProbe,
    GpuProbe,
    check_environment,
    check_gpu,
    check_limits,
    check_processors,
    check_versions,
)
from partial_fc.doctor.report import show, write_json
from partial_fc.doctor.storage import SHARED_SECONDS, Source, Token, check_data, check_shared, check_writing
from partial_fc.errors import ConfigError, PartialFCError
from partial_fc.plan import Machine, plan_run, sent
from partial_fc.ranks import joined_ranks
from partial_fc.verify import verification_sets

__all__ = ["run_doctor"]

# What of a rank's memory a commit holds.
_COMMITTED = ("class centres", "momentum", "running means", "running squares", "steps")
# Of a check on one rank, and of all checks of a rank together.
_CHECK_SECONDS = 60.0
_ALL_SECONDS = 300.0
# What the others need after rank 0 to be heard.
_MARGIN_SECONDS = 15.0
# Of all measurements, beside the timeout of a single collective.
_MEASURE_SECONDS = 120.0
_PARTING_SECONDS = 5.0


class _Result(NamedTuple):
    """What rank 0 shows.

    Attributes:
        name: of the run.
        findings: about the job.
        reports: of the ranks, rank 0's first.
        hosts: names.
        measured: in the group, by rank.
        listeners: the other ranks that may wait for the verdict.
    """

    name: str
    findings: list[Finding]
    reports: list[Report]
    hosts: Hosts
    measured: dict[int, Any]
    listeners: range


def run_doctor(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    megabytes: int = 64,
    json_file: Path | None = None,
    join_seconds: float = 60.0,
    console: Console | None = None,
    probe: GpuProbe | None = None,
) -> bool:
    """Check this job on every rank; rank 0 shows what was found.

    Ends in bounded time whatever the other ranks do; where the launcher ends it, rank 0 shows what it has. The caller
    ends the process at once (``os._exit``): a group that failed can't be taken down in order.

    Args:
        path: the configuration.
        overrides: changes to it.
        megabytes: size of the large message of the bandwidth test.
        json_file: where rank 0 writes all of it.
        join_seconds: how long to wait for ranks to come, and the timeout of the group (or the configured one, if
            shorter).
        console: where rank 0 shows it; None: standard output.
        probe: where GPUs are looked up; None: in this machine.

    Returns:
        Whether nothing failed, on every rank.

    Raises:
        PartialFCError: the job's store can't be reached, or rank 0 doesn't answer.
    """
    if megabytes < 1:
        raise ConfigError(f"--mb is {megabytes}, expected 1 or more")
    me = read_identity(os.environ, socket.gethostname())
    with Ending(active=me.rank == 0) as ending:
        board = open_board(me, join_seconds, ending.check)
        config, notes = _read(path, overrides)
        board.put("here", me.host)
        looked = [notes]
        try:
            with _run_folder_token(config, me, board):
                _look_around(config, looked, me, board, probe or CudaProbe(), ending)
                board.put("report", _report_of(me, looked).as_dict())
                if me.rank != 0:
                    return _follow(config, me, board, megabytes, join_seconds)
                found = _lead(config, me, board, looked, ending, megabytes, join_seconds)
            ending.answer()
        except Ended:
            ending.answer()
            found = _cut_off(config, me, board, looked)
        # The token is gone: torchrun ends all ranks as soon as one has left with a failure.
        return _tell(found, me, board, json_file, console)


def _read(path: Path, overrides: Sequence[str]) -> tuple[Config | None, Notes]:
    """The configuration, None where it can't be used: other ranks may have another file."""
    notes = Notes("configuration")
    try:
        config = load_config(path, overrides)
    except ConfigError as error:
        notes.fail(str(error))
        return None, notes
    notes.facts.update(_flat(config.model_dump(mode="json")))
    return config, notes


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``section.key`` -> value."""
    found: dict[str, Any] = {}
    for key, one in value.items():
        name = f"{prefix}{key}"
        found.update(_flat(one, f"{name}.") if isinstance(one, dict) else {name: one})
    return found


@contextlib.contextmanager
def _run_folder_token(config: Config | None, me: Identity, board: Board) -> Iterator[None]:
    """Rank 0 leaves a file in the folder of the runs while the others look for it; they get its name."""
    if me.rank != 0:
        yield
        return
    token: Token | None = None
    if config is not None:
        made: list[Token] = []
        # Why it can't be written is found by the check of writing.
        perform("token", lambda _: made.append(Token(Path(config.train.run_dir))), _CHECK_SECONDS)
        token = made[0] if made else None
    try:
        board.put("token", token.path.name if token is not None else "")
        yield
    finally:
        if token is not None:
            perform("token", token.remove, _PARTING_SECONDS)


def _look_around(
    config: Config | None, looked: list[Notes], me: Identity, board: Board, probe: GpuProbe, ending: Ending
) -> None:
    """All checks of this rank, onto the list ``looked``; each that fails is a finding, and the others go on."""

    def look(check: str, action: Callable[[Notes], None]) -> Notes:
        looked.append(perform(check, action, _CHECK_SECONDS, ending.check))
        return looked[-1]

    look("versions", lambda notes: check_versions(notes, probe))
    look("environment", lambda notes: check_environment(notes, me, os.environ))
    if config is not None:
        _look_at_configured(config, me, board, probe, look)


def _report_of(me: Identity, looked: Sequence[Notes]) -> Report:
    facts = {notes.check: notes.facts for notes in looked}
    found = [(notes.check, level, text) for notes in looked for level, text in notes.found]
    return Report(me.rank, me.node, me.host, facts, found)


def _look_at_configured(
    config: Config,
    me: Identity,
    board: Board,
    probe: GpuProbe,
    look: Callable[[str, Callable[[Notes], None]], Notes],
) -> None:
    """The checks that need the configuration."""
    data = look("data", lambda notes: check_data(notes, me, _sources(config), lambda: verification_sets(config)))
    files = sum(one["files"] for one in data.facts.get("sets", ()) if one["format"] != "folder")
    look("processors", lambda notes: check_processors(notes, me, config.data.threads))
    gpu = look("gpu", lambda notes: check_gpu(notes, me, config.train.device, probe))
    on_gpu = gpu.facts.get("device") == "cuda"
    look("limits", lambda notes: check_limits(notes, me, files=files, on_gpu=on_gpu))
    if me.world_size > 1:
        network = read_network(me.host, master_address())
        look("network", lambda notes: check_interfaces(notes, me, network, os.environ, on_gpu=on_gpu))
    # Last: rank 0's file has been there for a while.
    token = board.wait("token", 0, _CHECK_SECONDS)
    look("run folder", lambda notes: _check_run_folder(notes, me, Path(config.train.run_dir), token))


def _sources(config: Config) -> list[Source]:
    return [Source(one.path, one.format, one.num_classes) for one in (config.data, *config.data.more)]


def _check_run_folder(notes: Notes, me: Identity, folder: Path, token: str | None) -> None:
    if me.rank != 0 and token:
        check_shared(notes, folder, token, SHARED_SECONDS)
    if me.local_rank == 0 and not notes.found:
        folder.mkdir(parents=True, exist_ok=True)
        check_writing(notes, folder)


def _lead(
    config: Config | None,
    me: Identity,
    board: Board,
    looked: Sequence[Notes],
    ending: Ending,
    megabytes: int,
    join_seconds: float,
) -> _Result:
    """Rank 0: collect the reports, let all join, and put together what was found."""
    others = range(1, me.world_size)
    here = board.collect("here", others, join_seconds)
    answers = board.collect("report", here, _ALL_SECONDS)
    reports, hosts, needs, findings = _compare(config, me, looked, answers)
    findings += presence(me, here, answers, join_seconds, _ALL_SECONDS)
    # A rank without a configuration, or without its device, can't join; nor can those that aren't there.
    able = sum(bool(report.facts["configuration"]) for report in reports) == me.world_size
    able = able and not any(one.level == "fail" and one.check in ("ranks", "gpu") for one in findings)
    board.put("go", {"join": able})
    measured: dict[int, Any] = {}
    if able and config is not None:
        mine = _join(config, megabytes, join_seconds, ending.check)
        measured = {0: mine, **board.collect("measured", others, _timeout(config, join_seconds) + _MARGIN_SECONDS)}
        findings += _of_group(measured, hosts, needs, me.world_size)
    elif me.world_size > 1:
        text = "not joined, since what failed above hinders it: there is no figure of the network"
        findings.append(Finding("warn", "group", text))
    return _Result(_name(config), findings, reports, hosts, measured, others)


def _cut_off(config: Config | None, me: Identity, board: Board, looked: Sequence[Notes]) -> _Result:
    """Rank 0, ended by the launcher: what it found, and what the others told until now."""
    others = range(1, me.world_size)
    answers, measured = board.collect("report", others, 0), board.collect("measured", others, 0)
    reports, hosts, _, findings = _compare(config, me, looked, answers)
    findings.append(cut_off(me, answers, measured))
    # Those of this machine are ended, too.
    elsewhere = range(me.local_world_size, me.world_size)
    return _Result(_name(config), findings, reports, hosts, measured, elsewhere)


def _compare(
    config: Config | None, me: Identity, looked: Sequence[Notes], answers: Mapping[int, Any]
) -> tuple[list[Report], Hosts, Needs, list[Finding]]:
    """What rank 0 and the others found on their machines, and how that goes together."""
    reports = [_report_of(me, looked), *(_report(answers[rank]) for rank in sorted(answers))]
    hosts = Hosts(reports, me.world_size)
    needs, impossible = _needs(config, me.world_size, reports)
    return reports, hosts, needs, [*impossible, *merge(reports), *compare_all(reports, hosts, needs)]


def _name(config: Config | None) -> str:
    return (config.train.name if config is not None else None) or "no configuration"


def _tell(
    result: _Result,
    me: Identity,
    board: Board,
    json_file: Path | None,
    console: Console | None,
) -> bool:
    """Rank 0: show the result, and let the others go."""
    if console is None:
        console = Console(highlight=False)
    findings, machines = result.findings, len(result.hosts.nodes)
    ranks = f"{me.world_size} rank{'s' * (me.world_size > 1)}"
    title = f"{result.name}: {ranks} on {machines} machine{'s' * (machines > 1)}"
    ready = all(finding.level != "fail" for finding in findings)
    try:
        show(title, findings, result.hosts, console)
        sys.stdout.flush()
        if json_file is not None:
            write_json(json_file, findings, result.reports, result.measured)
    finally:
        board.put("done", {"ready": ready})
        # Rank 0 may keep the store: the others have read what they must before it goes.
        here = board.collect("here", result.listeners, 0)
        board.collect("parted", here, _PARTING_SECONDS)
    return ready


def _follow(config: Config | None, me: Identity, board: Board, megabytes: int, join_seconds: float) -> bool:
    """Every other rank: join where rank 0 says so, and end with its verdict."""
    go = board.wait("go", 0, join_seconds + _ALL_SECONDS + _MARGIN_SECONDS)
    if go is not None and go["join"] and config is not None:
        board.put("measured", _join(config, megabytes, join_seconds))
    # As long as rank 0 may take to join, and to hear of the others how it went.
    most = 2 * (join_seconds + _MARGIN_SECONDS) + _MEASURE_SECONDS
    done = board.wait("done", 0, most) if go is not None else None
    if done is None:
        error = PartialFCError("rank 0 does not answer: see its output, and start the job again")
        error.rank = me.rank
        raise error
    board.put("parted", True)
    return bool(done["ready"])


def _report(answer: Mapping[str, Any]) -> Report:
    found = [(check, level, text) for check, level, text in answer["found"]]
    return Report(answer["rank"], answer["node"], answer["host"], answer["facts"], found)


def _needs(config: Config | None, world_size: int, reports: Sequence[Report]) -> tuple[Needs, list[Finding]]:
    """What the run takes by the plan, and why there is none."""
    if config is None:
        return Needs(None, None, None, 0, {}), []
    # One is being written while the last ones and the best one are there.
    commits = config.checkpoint.keep_last + 2
    unknown = Needs(None, None, None, commits, {})
    batch = config.train.batch_size // config.train.accumulate
    if world_size > batch:
        text = f"{world_size} ranks for {batch} rows of a micro batch: raise train.batch_size, or start fewer ranks"
        return unknown, [Finding("fail", "configuration", text)]
    found: list[Needs] = []
    notes = perform("configuration", lambda _: found.append(_plan(config, world_size, reports[0], commits)), 60)
    return found[0] if found else unknown, [Finding(level, "configuration", text) for level, text in notes.found]


def _plan(config: Config, world_size: int, own: Report, commits: int) -> Needs:
    gpu = own.facts.get("gpu", {}).get("gpu")
    machine = Machine("GPU", gpu["free"], gpu["cache"], True) if gpu else Machine("CPU", 0, cpu_cache() // 2, False)
    run = plan_run(config, machine, world_size)
    counts = [one["classes"] for one in own.facts.get("data", {}).get("sets", ())]
    classes = None
    if counts and None not in counts:
        classes = max(counts) if config.data.merge_classes else sum(counts)
    if classes is None:
        return Needs(None, None, None, commits, {name: size for name, (size, _) in sent(run).items()})
    head = run.at(classes)
    whole = footprint.resident(run.at(classes, 1))
    backbone = run.backbone
    state = sum(whole.get(item, 0) for item in _COMMITTED) + backbone.parameters + backbone.buffers + backbone.state
    collectives = sent(dataclasses.replace(run, head=head))
    tensors = {name: size for name, (size, _) in collectives.items()}
    return Needs(classes, state, run.memory(head).together, commits, tensors)


def _timeout(config: Config, join_seconds: float) -> float:
    """Seconds that a collective of the preflight may take."""
    return min(config.train.timeout_seconds, join_seconds)


def _join(
    config: Config, megabytes: int, join_seconds: float, between: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """``links``: what was measured; or ``error``: why not."""
    timeout = _timeout(config, join_seconds)
    shorter = config.model_copy(update={"train": config.train.model_copy(update={"timeout_seconds": timeout})})
    # NCCL's watchdog would end this process after the timeout, and what was found with it; torchrun sets 1.
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    links: list[dict[str, Any]] = []

    def measure(notes: Notes) -> None:
        try:
            with joined_ranks(shorter) as place:
                links.append(measure_links(place.device, megabytes))
        except RuntimeError as error:
            notes.fail(str(error).strip().splitlines()[0][:200])

    notes = perform("group", measure, timeout + _MEASURE_SECONDS, between)
    if links and not notes.found:
        return {"links": links[0]}
    return {"error": notes.found[0][1]}


def _of_group(measured: Mapping[int, Any], hosts: Hosts, needs: Needs, world_size: int) -> list[Finding]:
    """The group, and what was measured in it."""
    errors: dict[str, list[int]] = {}
    for rank in range(world_size):
        found = measured.get(rank, {"error": "no answer"})
        if "error" in found:
            errors.setdefault(found["error"], []).append(rank)
    advice = "see the rows of network, and that no firewall is between the machines (gloo and NCCL take any port)"
    findings = [
        Finding("fail", "group", f"can't join or talk to each other ({error}): {advice}", tuple(ranks))
        for error, ranks in errors.items()
    ]
    if findings or world_size == 1:
        return findings
    links = {rank: found["links"] for rank, found in measured.items()}
    return [Finding("ok", "group", "all joined"), *compare_links(links, hosts, needs)]
