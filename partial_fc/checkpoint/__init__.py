"""Checkpoints: commits on a disk, tensors in them, what a run saves, and saving beside the training."""

from partial_fc.checkpoint.commits import (
    begin,
    clean,
    discard_after,
    list_commits,
    newest_commit,
    prune,
    read_commit,
    seal,
    sum_files,
)
from partial_fc.checkpoint.marker import Commit, FileSum, step_of
from partial_fc.checkpoint.saver import WRITE_TIMEOUT, Saved, Saver
from partial_fc.checkpoint.state import TrainingState, load_backbone, save_model
from partial_fc.checkpoint.tensors import local_part, read_into, read_whole, sharded, tensor_shapes, write_tensors

__all__ = [
    "WRITE_TIMEOUT",
    "Commit",
    "FileSum",
    "Saved",
    "Saver",
    "TrainingState",
    "begin",
    "clean",
    "discard_after",
    "list_commits",
    "load_backbone",
    "local_part",
    "newest_commit",
    "prune",
    "read_commit",
    "read_into",
    "read_whole",
    "save_model",
    "seal",
    "sharded",
    "step_of",
    "sum_files",
    "tensor_shapes",
    "write_tensors",
]
