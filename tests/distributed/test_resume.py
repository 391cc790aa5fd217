"""Runs that go on: at any world size, bit for bit at the same one, after failed saves and divergences."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from partial_fc.checkpoint import list_commits, tensors
from partial_fc.data.synthetic import make_dataset
from partial_fc.errors import MisfitError, NonFiniteError
from partial_fc.keeper import STOP
from partial_fc.train import Trainer
from tests.ranks import RankPool
from tests.trainings import Interrupted, lines_of, losses_of, train_here, write_config

CLASSES = 23


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faces")
    make_dataset(
        folder, identities=CLASSES, images_per_identity=4, validation_identities=8, pairs=40, image_size=32, workers=1
    )
    return folder


def break_off(trainer: Trainer, *, at: int) -> None:
    """Let the run end before step ``at``, as if its processes were killed."""
    genuine = trainer.training_step.run

    def run(number: int, **options: Any) -> Any:
        if number == at:
            raise Interrupted
        return genuine(number, **options)

    trainer.training_step.run = run  # type: ignore[method-assign]


def saved_weights(results: list[Any]) -> dict[str, torch.Tensor]:
    """Rank 0's backbone, and all class centres."""
    weights = dict(results[0][1])
    weights["head.weight"] = torch.cat([result[1]["head.weight"] for result in results])
    return weights


def test_saved_on_two_ranks_goes_on_with_the_same_losses_on_any_number(ranks: Any, tmp_path: Path, data: Path) -> None:
    """20 steps with sampling, a backbone without batch statistics: relative 1e-5."""
    config = str(write_config(tmp_path, data, optim={"schedule": "constant"}))
    whole = ranks(2).run(train_here, config, ["train.steps=30", "train.name=whole"], False, timeout=200)
    expected = losses_of(Path(whole[0][0]))
    short = ranks(2).run(train_here, config, ["train.steps=10", "train.name=short"], False, timeout=200)
    assert losses_of(Path(short[0][0])) == {step: expected[step] for step in range(1, 11)}
    for world_size in (1, 3, 4):
        options = ["train.steps=30", f"train.name=on_{world_size}", f"train.resume={short[0][0]}"]
        found = losses_of(Path(ranks(world_size).run(train_here, config, options, False, timeout=200)[0][0]))
        assert sorted(found) == list(range(11, 31))
        for step, loss in found.items():
            assert loss == pytest.approx(expected[step], rel=1e-5), (world_size, step)
    assert expected[30] < expected[11]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_same_world_size_goes_on_bit_for_bit_with_batch_norm(
    ranks: Any, tmp_path: Path, data: Path, optimizer: str
) -> None:
    rate = 0.1 if optimizer == "sgd" else 0.003
    sections = {"optim": {"name": optimizer, "learning_rate": rate}, "head": {"margin": "AdaFace"}}
    config = str(write_config(tmp_path, data, **sections))
    whole = ranks(2).run(train_here, config, ["train.name=whole"], timeout=200)
    options = ["train.name=parts", "checkpoint.every_steps=3", "checkpoint.background=false"]
    for end in (5, 8):
        ranks(2).run(train_here, config, options, True, functools.partial(break_off, at=end), timeout=200)
    parts = ranks(2).run(train_here, config, options, timeout=200)
    run = Path(parts[0][0])
    assert run == tmp_path / "runs" / "parts", "an unfinished run goes on in its folder"
    assert [line["step"] for line in lines_of(run, "resumed")] == [3, 6]
    assert losses_of(run) == losses_of(Path(whole[0][0]))
    expected = saved_weights(whole)
    for name, value in saved_weights(parts).items():
        assert torch.equal(value, expected[name]), name
    assert json.loads((run / "status.json").read_text())["state"] == "finished"


def test_commits_that_cannot_be_used_cost_steps_and_no_run(ranks: Any, tmp_path: Path, data: Path) -> None:
    config = str(write_config(tmp_path, data))
    options = ["checkpoint.every_steps=2", "checkpoint.keep_last=9", "checkpoint.background=false"]
    interrupted = functools.partial(break_off, at=9)
    run = Path(ranks(2).run(train_here, config, options, True, interrupted, timeout=200)[0][0])
    newest, second, *_ = list_commits(run / "checkpoints")
    (newest / "commit.json").unlink()
    file = next(second.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    for world_size in (2, 1):
        change = functools.partial(break_off, at=7) if world_size == 2 else None
        ranks(world_size).run(train_here, config, [*options, "checkpoint.every_steps=null"], True, change, timeout=200)
    assert [line["step"] for line in lines_of(run, "resumed")] == [4, 4]


def full_disk(trainer: Trainer, *, until: int) -> None:
    """Let rank 1's disk be full before step ``until``."""
    if trainer.place.rank != 1:
        return
    genuine = tensors._SummedStream.write

    def write(stream: Any, block: Any) -> int:
        if trainer.kept.progress.step < until:
            raise OSError(28, "No space left on device")
        return genuine(stream, block)

    tensors._SummedStream.write = write  # type: ignore[method-assign]


def test_a_full_disk_leaves_the_last_commit_and_the_run_goes_on(ranks: Any, tmp_path: Path, data: Path) -> None:
    config = str(write_config(tmp_path, data))
    options = ["checkpoint.every_steps=3", "checkpoint.background=false"]
    change = functools.partial(full_disk, until=8)
    run = Path(ranks(2).run(train_here, config, options, True, change, timeout=200)[0][0])
    assert [line["step"] for line in lines_of(run, "commit")] == [9, 12]
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    assert not list((run / "checkpoints").glob(".*"))


def not_a_number(trainer: Trainer, *, steps: range, rank: int) -> None:
    """Let the images of a rank hold a NaN in these steps."""
    genuine = trainer.stream.next_batch

    def next_batch() -> Any:
        batch = genuine()
        if trainer.kept.progress.step in steps and trainer.place.rank == rank:
            batch.images[0] = math.nan
        return batch

    trainer.stream.next_batch = next_batch  # type: ignore[method-assign]


def test_a_step_that_is_not_finite_is_left_out_on_all_ranks_and_its_samples_are_named(
    ranks: Any, tmp_path: Path, data: Path
) -> None:
    config = str(write_config(tmp_path, data))
    change = functools.partial(not_a_number, steps=range(4, 6), rank=1)
    results = ranks(2).run(train_here, config, ["train.nonfinite=skip"], True, change, timeout=200)
    run = Path(results[0][0])
    skipped = lines_of(run, "skipped")
    assert [line["step"] for line in skipped] == [5, 6]
    assert all(len(set(line["sample_ids"])) == 12 for line in skipped)
    assert losses_of(run)[5] is None and losses_of(run)[7] is not None
    for name, value in saved_weights(results).items():
        assert torch.isfinite(value.float()).all(), name


def huge_gradient(trainer: Trainer, *, at: int) -> None:
    """Let rank 0's gradient of the backbone overflow in one step, though its loss is finite."""
    parameter = next(iter(trainer.backbone.parameters()))

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        bad = trainer.kept.progress.step == at and trainer.place.rank == 0
        return gradient * math.inf if bad else gradient

    parameter.register_hook(hook)


def test_a_gradient_of_the_backbone_that_is_not_finite_is_left_out(ranks: Any, tmp_path: Path, data: Path) -> None:
    config = str(write_config(tmp_path, data))
    change = functools.partial(huge_gradient, at=4)
    results = ranks(2).run(train_here, config, ["train.nonfinite=skip"], True, change, timeout=200)
    assert [line["step"] for line in lines_of(Path(results[0][0]), "skipped")] == [5]
    first, second = results[0][1], results[1][1]
    for name in first:
        if name != "head.weight" and "running" not in name:
            assert torch.equal(first[name], second[name]) and torch.isfinite(first[name].float()).all(), name


ROLLBACK = ["train.nonfinite=skip", "train.nonfinite_limit=2", "checkpoint.every_steps=3", "checkpoint.keep_last=5"]
ROLLBACK += ["checkpoint.background=false"]


def test_after_so_many_bad_steps_the_run_goes_back_with_a_lower_learning_rate(
    ranks: Any, tmp_path: Path, data: Path
) -> None:
    config = str(write_config(tmp_path, data, optim={"schedule": "constant"}))
    change = functools.partial(bad_until_rolled_back, steps=range(7, 12))
    options = [*ROLLBACK, "train.on_divergence=rollback", "train.steps=15"]
    run = Path(ranks(2).run(train_here, config, options, True, change, timeout=200)[0][0])
    (back,) = lines_of(run, "rollback")
    assert back["step"] == 6 and back["learning_rate_factor"] == 0.5
    rates = {line["step"]: line["learning_rate"]["head"] for line in lines_of(run, "train")}
    assert rates[6] == 0.1 and rates[15] == 0.05
    commits = [json.loads((folder / "run.json").read_text()) for folder in list_commits(run / "checkpoints")]
    assert commits[0]["step"] == 15 and commits[0]["learning_rate_factor"] == 0.5


def bad_until_rolled_back(trainer: Trainer, *, steps: range) -> None:
    """NaN in these steps, until the run went back once."""
    genuine = trainer.stream.next_batch

    def next_batch() -> Any:
        batch = genuine()
        if trainer.kept.progress.step in steps and not trainer.kept.progress.rollbacks:
            batch.images[0] = math.nan
        return batch

    trainer.stream.next_batch = next_batch  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["train.on_divergence=stop"], "the run diverged .step 9: 2 steps in a row"),
        (["train.on_divergence=rollback", "train.max_rollbacks=2"], "again, after 2 returns"),
        (["train.on_divergence=rollback", "checkpoint.every_steps=100"], "no commit to go back to"),
    ],
)
def test_a_run_that_cannot_be_saved_ends_with_one_line_on_all_ranks(
    ranks: Any, tmp_path: Path, data: Path, options: list[str], message: str
) -> None:
    config = str(write_config(tmp_path, data))
    change = functools.partial(not_a_number, steps=range(7, 12), rank=0)
    with pytest.raises(AssertionError, match=message) as failure:
        ranks(2).run(train_here, config, [*ROLLBACK, *options], True, change, timeout=200)
    assert NonFiniteError.__name__ in str(failure.value)
    status = json.loads((tmp_path / "runs" / "tiny" / "status.json").read_text())
    assert status["state"] == "failed" and "diverged" in status["reason"]


def test_the_best_commit_is_kept(ranks: Any, tmp_path: Path, data: Path) -> None:
    options = {"evaluate": {"sets": ["demo_val.bin"], "every_steps": 2}, "checkpoint": {"keep_last": 1}}
    run = Path(ranks(2).run(train_here, str(write_config(tmp_path, data, **options)), [], timeout=200)[0][0])
    evaluated = {line["step"]: line["accuracy"] for line in lines_of(run, "evaluation")}
    best = max(evaluated.values())
    kept = [json.loads((folder / "run.json").read_text()) for folder in list_commits(run / "checkpoints")]
    assert kept[0]["step"] == 12 and max(info["accuracy"] for info in kept) == best
    assert len(kept) == (1 if evaluated[12] == best else 2)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("backbone.embedding_size=24", "embedding"),
        ("head.margin=AdaFace", "AdaFace"),
        ("optim.head_name=adamw", "exp_avg"),
    ],
)
def test_a_commit_of_something_else_is_refused_on_all_ranks(
    ranks: Any, tmp_path: Path, data: Path, override: str, message: str
) -> None:
    config = str(write_config(tmp_path, data))
    run = ranks(2).run(train_here, config, ["train.steps=3"], timeout=200)[0][0]
    options = [override, f"train.resume={run}", "train.name=other"]
    with pytest.raises(AssertionError, match=message) as failure:
        ranks(2).run(train_here, config, options, timeout=200)
    assert MisfitError.__name__ in str(failure.value)


def test_a_run_whose_commits_are_all_bad_does_not_begin_anew(ranks: Any, tmp_path: Path, data: Path) -> None:
    config, options = str(write_config(tmp_path, data)), ["checkpoint.every_steps=2", "checkpoint.background=false"]
    run = Path(ranks(2).run(train_here, config, options, True, functools.partial(break_off, at=5), timeout=200)[0][0])
    for folder in list_commits(run / "checkpoints"):
        (folder / "run.json").write_text("{}")
    with pytest.raises(AssertionError, match=r"none of the 2 commits .* can be used.*train.resume=never"):
        ranks(2).run(train_here, config, options, timeout=200)


def test_never_begins_a_new_run(ranks: Any, tmp_path: Path, data: Path) -> None:
    config, options = str(write_config(tmp_path, data)), ["checkpoint.every_steps=2", "checkpoint.background=false"]
    change = functools.partial(break_off, at=4)
    first = ranks(1).run(train_here, config, options, True, change, timeout=200)[0][0]
    second = ranks(1).run(train_here, config, ["train.resume=never", "train.steps=3"], timeout=200)[0][0]
    assert (Path(first).name, Path(second).name) == ("tiny", "tiny-2")
    assert lines_of(Path(second), "resumed") == []


@pytest.mark.parametrize("action", ["stop", "rollback"])
def test_a_divergence_in_the_last_step_counts(ranks: Any, tmp_path: Path, data: Path, action: str) -> None:
    config = str(write_config(tmp_path, data))
    change = functools.partial(bad_until_rolled_back, steps=range(10, 12))
    options = [*ROLLBACK, f"train.on_divergence={action}"]
    if action == "stop":
        with pytest.raises(AssertionError, match="the run diverged .step 12"):
            ranks(2).run(train_here, config, options, True, change, timeout=200)
        return
    run = Path(ranks(2).run(train_here, config, options, True, change, timeout=200)[0][0])
    assert [line["step"] for line in lines_of(run, "rollback")] == [9]
    assert losses_of(run)[12] is not None


def stop_at(trainer: Trainer, *, at: int, full: bool = False) -> None:
    """A signal at step ``at``, with a disk that is full from then on."""
    genuine = trainer.training_step.run

    def run(number: int, **options: Any) -> Any:
        if number == at:
            trainer.council.ask(STOP)
            if full:
                full_disk(trainer, until=10**9)
        return genuine(number, **options)

    trainer.training_step.run = run  # type: ignore[method-assign]


def test_a_signal_on_a_full_disk_names_the_commit_that_is_there(ranks: Any, tmp_path: Path, data: Path) -> None:
    config, options = str(write_config(tmp_path, data)), ["checkpoint.every_steps=3", "checkpoint.background=false"]
    change = functools.partial(stop_at, at=4, full=True)
    with RankPool(2) as fresh:
        run = Path(fresh.run(train_here, config, options, True, change, timeout=200)[0][0])
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"], status["committed"]) == ("resume", 6, 3)
    again = Path(ranks(2).run(train_here, config, options, timeout=200)[0][0])
    assert again == run and [line["step"] for line in lines_of(run, "resumed")] == [3]


@pytest.mark.parametrize("at", [4, 10, 11])
def test_a_signal_at_any_step_ends_in_a_commit_of_the_last_one(ranks: Any, tmp_path: Path, data: Path, at: int) -> None:
    config = str(write_config(tmp_path, data))
    run = Path(ranks(2).run(train_here, config, [], True, functools.partial(stop_at, at=at), timeout=200)[0][0])
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "resume" and status["committed"] == status["step"] == min(at + 2, 12)
    ranks(2).run(train_here, config, [], timeout=200)
    assert json.loads((run / "status.json").read_text())["state"] == "finished"


@pytest.mark.parametrize("micro", [0, 1])
def test_a_step_left_out_changes_nothing_after_it_with_micro_batches(
    ranks: Any, tmp_path: Path, data: Path, micro: int
) -> None:
    """DDP must not sum in the middle of a step: the run that goes on from a commit knows nothing of the bad step."""
    config = str(write_config(tmp_path, data))
    options = ["train.accumulate=2", "train.nonfinite=skip", "checkpoint.background=false"]
    change = functools.partial(bad_micro_batch, at=4, micro=micro)
    whole = ranks(2).run(train_here, config, [*options, "train.name=whole"], True, change, timeout=200)
    parts = [*options, "train.name=parts", "checkpoint.every_steps=5"]
    both = functools.partial(bad_and_broken_off, at=4, micro=micro, end=7)
    ranks(2).run(train_here, config, parts, True, both, timeout=200)
    # Nothing is committed after a bad step: the commit that was due then is of the step after it.
    run = Path(ranks(2).run(train_here, config, parts, timeout=200)[0][0])
    assert [line["step"] for line in lines_of(run, "resumed")] == [6]
    assert losses_of(run) == losses_of(Path(whole[0][0]))


def bad_micro_batch(trainer: Trainer, *, at: int, micro: int) -> None:
    """NaN in one micro batch of step ``at``."""
    genuine = trainer.stream.next_batch

    def next_batch() -> Any:
        inside = trainer.stream.position - trainer.kept.progress.samples
        batch = genuine()
        if trainer.kept.progress.step == at and inside // 6 == micro:
            batch.images[0] = math.nan
        return batch

    trainer.stream.next_batch = next_batch  # type: ignore[method-assign]


def bad_and_broken_off(trainer: Trainer, *, at: int, micro: int, end: int) -> None:
    bad_micro_batch(trainer, at=at, micro=micro)
    break_off(trainer, at=end)
