"""The demonstration: a drawn data set, a torchrun training, an evaluation, and where everything is."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.progress import Progress

from partial_fc.config import Config, load_config
from partial_fc.data.synthetic import make_dataset
from partial_fc.errors import ConfigError, PartialFCError


def run_demo(config_path: Path, overrides: Sequence[str]) -> None:
    """Draw the data set where it isn't there, train with torchrun, evaluate and report.

    Args:
        config_path: configuration of the demonstration.
        overrides: changes to it.

    Raises:
        ConfigError: the configuration can't be used, or names a data folder that holds something else.
        PartialFCError: a step failed; its own message stands above.
    """
    config = load_config(config_path, overrides)
    data = Path(config.data.path).expanduser()
    if not (data / "train.idx").is_file():
        # What a drawing that was killed leaves behind is overwritten.
        left = {"demo_val.bin"} | {path.name for path in data.glob("*.partial")}
        if data.exists() and any(path.name not in left for path in data.iterdir()):
            raise ConfigError(f"data.path is {data}, which holds files but no train.idx: empty it, or choose another")
        _draw_dataset(data, config)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    processes = gpus if gpus and config.train.device != "cpu" else 2
    train = _torchrun(processes, "train", str(config_path), *overrides)
    before = set(_runs(config))
    _show_and_run(train)
    new = sorted(set(_runs(config)) - before, key=lambda path: path.stat().st_mtime)
    if not new:
        raise PartialFCError(f"{config.train.run_dir} holds no new run: was it removed while the training ran?")
    run = new[-1]
    _show_and_run([sys.executable, "-m", "partial_fc", "evaluate", str(run)])
    print()
    print(f"run folder    {run}")
    print(f"report        {run / 'report.md'}")
    if config.metrics.enabled:
        print(
            f"metrics       http://{config.metrics.address}:{config.metrics.port}/metrics while a run trains "
            f"(port + local rank), and {run / 'metrics.jsonl'}"
        )


def _draw_dataset(folder: Path, config: Config) -> None:
    begin = time.monotonic()
    print(f"drawing a data set in {folder} (2,000 identities, 20 images each)", flush=True)
    # No refresh thread: beside one, the workers would have to be spawned instead of forked, which takes seconds.
    with Progress(disable=not sys.stdout.isatty(), auto_refresh=False) as bar:
        task = bar.add_task("drawing", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, refresh=True)

        make_dataset(folder, image_size=config.data.image_size, progress=show)
    print(f"drawn in {time.monotonic() - begin:.0f} s", flush=True)


def _torchrun(processes: int, *arguments: str) -> list[str]:
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--nproc-per-node", str(processes)),
        # A rendezvous on the loopback: it works in containers whose host name doesn't resolve, too.
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"),
        *("-m", "partial_fc", *arguments),
    ]


def _runs(config: Config) -> list[Path]:
    place = Path(config.train.run_dir)
    return [path for path in place.glob("*") if (path / "config.yaml").is_file()]


def _show_and_run(command: list[str]) -> None:
    shown = ["torchrun" if word == "torch.distributed.run" else word for word in command]
    if "torchrun" in shown:
        shown = shown[shown.index("torchrun") :]
    print(f"$ {shlex.join(shown)}", flush=True)
    done = subprocess.run(command, env={**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}, check=False)
    if done.returncode:
        raise PartialFCError(f"that command failed with exit code {done.returncode}: see its message above")
