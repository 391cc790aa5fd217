"""What is known of a run: typed, ready for JSON. :mod:`partial_fc.status.gather` fills it in, the view draws it.

Times are seconds of Unix time, durations seconds, sizes bytes; what isn't known is None.
"""

from __future__ import annotations

from dataclasses import dataclass, field

# What a program that asks learns from the exit code.
EXIT_CODES = {"running": 0, "finished": 0, "failed": 3, "resume": 4, "silent": 5, "stalled": 5, "unknown": 5}


@dataclass
class Evaluation:
    """Verification on one set.

    Attributes:
        accuracy: the last one, 0 to 1.
        step: at which that was.
        best: the best one in effect.
        best_step: at which that was; the first where several are as good.
    """

    accuracy: float
    step: int
    best: float
    best_step: int


@dataclass
class Loss:
    """The loss of the lines of steps.

    Attributes:
        last: of the last line; unknown where that step was skipped.
        change: the mean of the later half of the last lines minus that of the earlier half.
        trend: ``falling``, ``rising`` or ``level``: whether ``change`` is more than their scatter explains.
        over_steps: steps from the first to the last of these lines.
        curve: (step, loss) over the whole run, at most some hundred.
    """

    last: float | None = None
    change: float | None = None
    trend: str | None = None
    over_steps: int | None = None
    curve: list[tuple[int, float]] = field(default_factory=list)


@dataclass
class Commits:
    """What is saved.

    Attributes:
        step: steps done at the last commit.
        at: when it was done.
        bytes: its size, all ranks'.
        seconds: from its copy until it was there.
        copy_seconds: that it delayed the training.
        failed: commits that could not be written since the processes started; only their endpoints know.
    """

    step: int | None = None
    at: float | None = None
    bytes: int | None = None
    seconds: float | None = None
    copy_seconds: float | None = None
    failed: int | None = None


@dataclass
class Waiting:
    """What a rank without progress last wrote about whom it waits for.

    Attributes:
        rank: which wrote.
        at: when.
        text: in its words.
    """

    rank: int
    at: float
    text: str


@dataclass
class Faults:
    """What went wrong and was got over, or wasn't.

    Attributes:
        restarts: how often the run went on.
        rollbacks: how often it went back to a commit after a divergence.
        rollback_step: the step of the last of these commits.
        skipped_steps: steps without an update, but for overflows in fp16.
        skipped_step: the last of them.
        skipped_reason: why that was.
        decode_errors: replaced samples by kind, since the processes started.
        stalled_ranks: ranks that make no progress now.
        waiting: what ranks wrote, the newest first; of stalls that are over, too.
    """

    restarts: int = 0
    rollbacks: int = 0
    rollback_step: int | None = None
    skipped_steps: int = 0
    skipped_step: int | None = None
    skipped_reason: str | None = None
    decode_errors: dict[str, int] = field(default_factory=dict)
    stalled_ranks: list[int] = field(default_factory=list)
    waiting: list[Waiting] = field(default_factory=list)


@dataclass
class Rank:
    """A rank by its endpoint.

    Attributes:
        rank: its number; -1: the file of targets names none.
        address: of the endpoint.
        up: whether it answers.
        problem: why it doesn't, in words.
        step: steps of the run that it has done.
        stalled: whether it makes no progress.
        queue: batches that are ready ahead.
        queue_capacity: how many may be.
        resident_bytes: memory of the process.
        gpu_bytes: that PyTorch holds on its GPU; 0 on a CPU.
        gpu_peak_bytes: most that tensors had there.
        host_available_bytes: that programs on its machine can still have.
        phase_seconds: seconds a step by phase, since the last look, or since the process started.
    """

    rank: int
    address: str
    up: bool
    problem: str | None = None
    step: int | None = None
    stalled: bool = False
    queue: int | None = None
    queue_capacity: int | None = None
    resident_bytes: int | None = None
    gpu_bytes: int | None = None
    gpu_peak_bytes: int | None = None
    host_available_bytes: int | None = None
    phase_seconds: dict[str, float] = field(default_factory=dict)


@dataclass
class Imbalance:
    """The phase in which one rank spends more than the others, who then wait for it.

    Attributes:
        rank: which.
        phase: which.
        seconds: a step, of that rank.
        median_seconds: a step, of all.
    """

    rank: int
    phase: str
    seconds: float
    median_seconds: float


@dataclass
class Facts:
    """A run.

    Attributes:
        folder: the run's.
        name: of the run.
        state: ``running``, ``finished``, ``resume`` (saved and ended on a signal), ``failed``; ``silent`` (it is said
            to run, and nothing shows that it lives), ``stalled`` (it lives and makes no progress), ``unknown``.
        exit_code: of the command for this state.
        reason: why it failed.
        updated: when the run last wrote something, by its clock.
        signs: what shows that it lives, or that nothing does, in words.
        step: steps done.
        planned_steps: steps of the whole run.
        epoch: passes over the data.
        samples: position in the sample stream.
        world_size: number of ranks.
        batch_size: samples a step, all ranks'.
        images_per_second: of the last minutes, without evaluations.
        seconds_a_step: of the last hour, with all that lies between steps.
        remaining_seconds: what is left at that pace.
        trained_seconds: of all starts, each up to its last line of a step.
        phase_seconds: rank 0's seconds a step by phase, of the last line.
        loss: of the run.
        figures: the last line's other figures of the head, by name.
        learning_rate: by group.
        evaluations: by set.
        evaluation_seconds: that the last one took, all sets.
        commits: what is saved.
        faults: what went wrong.
        ranks: by their endpoints; none where they weren't asked.
        imbalance: a rank that the others wait for, if there is one.
        notes: what couldn't be read, a line each.
    """

    folder: str
    name: str | None = None
    state: str = "unknown"
    exit_code: int = EXIT_CODES["unknown"]
    reason: str | None = None
    updated: float | None = None
    signs: str | None = None
    step: int | None = None
    planned_steps: int | None = None
    epoch: float | None = None
    samples: int | None = None
    world_size: int | None = None
    batch_size: int | None = None
    images_per_second: float | None = None
    seconds_a_step: float | None = None
    remaining_seconds: float | None = None
    trained_seconds: float | None = None
    phase_seconds: dict[str, float] = field(default_factory=dict)
    loss: Loss = field(default_factory=Loss)
    figures: dict[str, float] = field(default_factory=dict)
    learning_rate: dict[str, float] = field(default_factory=dict)
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    evaluation_seconds: float | None = None
    commits: Commits = field(default_factory=Commits)
    faults: Faults = field(default_factory=Faults)
    ranks: list[Rank] = field(default_factory=list)
    imbalance: Imbalance | None = None
    notes: list[str] = field(default_factory=list)
