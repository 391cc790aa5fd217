"""A cluster of SLURM in tests: a controller and a few nodes, each in a network namespace of its own, with real jobs.

Nothing of an installed SLURM or munge is used but the programs: configuration, key, sockets, state and spool are in a
temporary folder. The daemons, and the jobs' processes, carry the mark of :mod:`tests.jobs`, which ends them.

It takes root, and Debian's packages slurm-wlm and munge.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from tests.jobs import Guard, JobFailed, Jobs, serve_as_guard
from tests.needs import need_programs
from tests.nodes import Node, nodes_or_skip

# Seconds that a job which is queued again waits for: two minutes by SLURM's default.
REQUEUE_SECONDS = 5
# States in which a job stays.
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "DEADLINE", "OUT_OF_MEMORY", "BOOT_FAIL")
_START = 60.0
# Jobs ends what is left by SIGABRT, and the daemons would leave their memory in a file.
_NO_CORE = ("prlimit", "--core=0:0")
_CONFIGURATION = """
ClusterName=test
SlurmctldHost={controller}({address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={requeue_seconds}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
MailProg=/bin/true
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,sched_min_interval=0
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=20
InactiveLimit=0
SlurmctldTimeout=300
SlurmdTimeout=300
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60 MaxTime=UNLIMITED
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF MaxTime=UNLIMITED
"""


class Cluster:
    """A running cluster.

    Args:
        folder: of its configuration, sockets and state; its path is short, as paths of sockets have to be.
        jobs: that its daemons belong to.
        nodes: the first is the controller, too.
    """

    def __init__(self, folder: Path, jobs: Jobs, nodes: list[Node]) -> None:
        self._folder, self._jobs, self._nodes = folder, jobs, nodes

    def start(self) -> None:
        """Start the daemons, and wait until all nodes are idle."""
        folder = self._folder
        (folder / "state").mkdir()
        (folder / "munge.key").write_bytes(secrets.token_bytes(128))
        (folder / "munge.key").chmod(0o400)
        lines = "\n".join(
            f"NodeName={node.host} NodeAddr={node.address} NodeHostname={node.host} CPUs=2 State=UNKNOWN"
            for node in self._nodes
        )
        controller = self._nodes[0]
        (folder / "slurm.conf").write_text(
            _CONFIGURATION.format(
                controller=controller.host,
                address=controller.address,
                folder=folder,
                requeue_seconds=REQUEUE_SECONDS,
                nodes=lines,
            ),
            encoding="ascii",
        )
        # Nothing here uses control groups, and a network namespace's /sys has none to find the kind of.
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n", encoding="ascii")
        files = ("key", "socket", "pid", "log", "seed")
        places = [f"--{file}-file={folder}/munge.{file}" for file in files if file != "socket"]
        munged = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *places]
        self._jobs.start("munged", munged)
        self._jobs.wait_until((folder / "munge.socket").exists, "munged to listen", _START)
        environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        self._jobs.start("slurmctld", [*_NO_CORE, "slurmctld", "-D", "-c"], environment, controller.command)
        for node in self._nodes:
            (folder / f"spool-{node.host}").mkdir()
            self._jobs.start(
                f"slurmd {node.host}", [*_NO_CORE, "slurmd", "-D", "-N", node.host], environment, node.command
            )
        self._jobs.wait_until(self.is_idle, "all nodes of the cluster to be idle", _START)

    def is_idle(self) -> bool:
        """Whether no node has anything to do."""
        with contextlib.suppress(subprocess.CalledProcessError):
            return self.command("sinfo", "--noheader", "--partition", "low", "--format", "%T %D").split() == [
                "idle",
                str(len(self._nodes)),
            ]
        return False

    def command(self, *words: str) -> str:
        """What a command of SLURM prints on the controller's node.

        Raises:
            subprocess.CalledProcessError: it failed.
        """
        environment = {**os.environ, "SLURM_CONF": str(self._folder / "slurm.conf")}
        command = [*self._nodes[0].command, *words]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True).stdout

    def submit(self, *words: str, environment: Mapping[str, str] | None = None) -> str:
        """Submit a batch job and return its number. It gets the environment of the tests, changed by this one."""
        changes = {"SLURM_CONF": str(self._folder / "slurm.conf"), **(environment or {})}
        # As a job of the tests, so that its processes carry the mark.
        command = ["sbatch", "--parsable", *words]
        return self._jobs.start("sbatch", command, changes, self._nodes[0].command).succeed(_START).strip()

    def job(self, number: str) -> dict[str, str]:
        """What SLURM knows of a job, such as ``JobState``, ``Reason``, ``ExitCode`` and ``Restarts``."""
        words = self.command("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.partition("=")[::2] for word in words)

    def wait_for(self, number: str, state: str, timeout: float) -> dict[str, str]:
        """Wait until a job is in this state, and return what is known of it.

        Raises:
            JobFailed: it isn't in time, or ended in another.
        """
        found: list[dict[str, str]] = [{}]

        def there() -> bool:
            found[0] = self.job(number)
            return found[0]["JobState"] in {state, *ENDED}

        self._jobs.wait_until(there, f"job {number} to be {state}", timeout)
        if found[0]["JobState"] != state:
            raise JobFailed(f"job {number} is {found[0]['JobState']}, expected {state}")
        return found[0]

    def wait_until(self, condition: Callable[[], object], what: str, timeout: float) -> None:
        """As that of :class:`tests.jobs.Jobs`."""
        self._jobs.wait_until(condition, what, timeout)


@contextlib.contextmanager
def cluster_or_skip(count: int) -> Iterator[Cluster]:
    """A cluster of so many nodes; skips the test, or fails it where ``PARTIAL_FC_REQUIRE`` asks for ``slurm``."""
    need_programs("slurm", "munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
    with contextlib.ExitStack() as stack:
        nodes = stack.enter_context(nodes_or_skip(count))
        folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        stack.callback(_remove, str(folder))
        stack.callback(Guard("tests.slurm", str(folder)).dismiss)
        jobs = stack.enter_context(Jobs(folder))
        cluster = Cluster(folder, jobs, nodes)
        cluster.start()
        yield cluster


def _remove(folder: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    serve_as_guard(_remove)
