"""Container images in tests, built by buildah and run by podman: no daemon, no registry.

All that they keep is in one folder, none of the system's: images, containers, settings. It's gone in the end, with its
mounts and processes, also where the test process is killed.

No registry is needed: the base image is made by mmdebstrap, of the packages of which ``debian:bookworm-slim`` is made.
pip in the builds is set up as it is on this machine: the same indexes, the same authorities.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.jobs import MARK, Guard, JobFailed, kill_marked, send, serve_as_guard
from tests.needs import lacks, need_programs

ROOT = Path(__file__).parents[1]
DEBIAN = "bookworm"
BASE = "localhost/base"
PROGRAMS = ("buildah", "podman", "mmdebstrap", "runc")
_CONTAINER_PROGRAMS = ("podman", "conmon", "buildah", "runc")
# What pip needs to know of this machine to find packages.
_PIP_KEYS = ("index-url", "extra-index-url", "find-links", "no-index", "trusted-host", "proxy", "timeout", "constraint")
# Where pip's settings lie in a build.
_PIP = "/run/pip"
_CONTAINERS = """
[containers]
# The limits that podman asks for are more than a container that runs this test may have.
default_ulimits = ["nofile=20000:20000", "nproc=20000:20000"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "none"
lock_type = "file"
"""
_STORAGE = """
[storage]
driver = "overlay"
graphroot = "{folder}/images"
runroot = "{folder}/run"
"""


class Images:
    """Images and containers of a test module, a context manager that leaves nothing behind."""

    def __init__(self) -> None:
        need_programs("containers", *PROGRAMS)
        if os.geteuid() != 0:
            lacks("containers", "the tests aren't run by root")
        # A short name: the sockets of containers lie in it, and a socket's path may have 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="images-"))
        self._guard: Guard | None = None

    def __enter__(self) -> Images:
        (self.folder / "containers.conf").write_text(_CONTAINERS, encoding="utf-8")
        (self.folder / "storage.conf").write_text(_STORAGE.format(folder=self.folder), encoding="utf-8")
        (self.folder / "tmp").mkdir()
        self._guard = Guard("tests.images", str(self.folder))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        clear(str(self.folder))
        if self._guard is not None:
            self._guard.dismiss()

    def run(self, *command: str | Path, timeout: float, ok: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a program of :data:`PROGRAMS`, and return what it printed.

        Args:
            command: its command line.
            timeout: seconds.
            ok: whether another exit code than 0 is a failure.

        Raises:
            JobFailed: it failed, or was late; the message has its last lines.
        """
        done = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=_environment(self.folder),
        )
        try:
            output, _ = done.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            kill_marked(str(self.folder))
            output, _ = done.communicate(timeout=10)
            raise JobFailed(f"{command[0]} {command[1]} took more than {timeout:.0f} s\n{_tail(output)}") from None
        if ok and done.returncode:
            raise JobFailed(f"{command[0]} {command[1]} ended with {done.returncode}\n{_tail(output)}")
        return subprocess.CompletedProcess(command, done.returncode, output, "")

    def make_base(self) -> None:
        """Make :data:`BASE`, a minimal Debian."""
        archive = self.folder / "base.tar"
        # As the images of Debian's that are called slim: without manuals and documents.
        without = [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("doc", "man", "info", "locale")]
        self.run("mmdebstrap", "--quiet", "--variant=minbase", *without, DEBIAN, archive, timeout=600)
        self.run("podman", "import", "--quiet", archive, BASE, timeout=120)
        archive.unlink()

    def build(self, context: Path, tag: str, **arguments: str) -> str:
        """Build ``docker/Dockerfile`` of a folder, and return what was printed.

        Args:
            context: a folder with the project's files.
            tag: name of the image.
            arguments: build arguments, ``BASE`` excepted.
        """
        given = [f"--build-arg={key}={value}" for key, value in {"BASE": BASE, **arguments}.items()]
        # The docker format, as the other one knows no health check.
        fixed = [
            "--isolation=chroot",
            "--format=docker",
            "--layers",
            "--tag",
            tag,
            f"--file={context}/docker/Dockerfile",
        ]
        done = self.run("buildah", "build", *fixed, *given, *self._pip(), context, timeout=1500)
        return done.stdout

    def layers(self, tag: str) -> list[str]:
        """Digests of an image's layers, the lowest first."""
        found: list[str] = self._inspect(tag)["RootFS"]["Layers"]
        return found

    def config(self, tag: str) -> dict[str, Any]:
        """What an image says about how it's run."""
        found = self._inspect(tag)
        return {"Healthcheck": found.get("Healthcheck"), **found["Config"]}

    def layer_bytes(self, tag: str) -> list[int]:
        """Bytes of the image's layers that aren't empty, the lowest first."""
        history = json.loads(self.run("podman", "history", "--format=json", tag, timeout=60).stdout)
        return [step["size"] for step in reversed(history) if step["size"]]

    def _inspect(self, tag: str) -> Any:
        return json.loads(self.run("podman", "image", "inspect", tag, timeout=60).stdout)[0]

    def _pip(self) -> list[str]:
        """Options that give a build this machine's settings of pip, and the local folders that they name."""
        folder = self.folder / "pip"
        folder.mkdir(exist_ok=True)
        lines, mounts = ["[global]"], {folder: _PIP}
        for key, value in _pip_settings().items():
            if key in ("cert", "client-cert"):
                # A copy: the build installs authorities where the machine's own lie.
                shutil.copy(value, folder / f"{key}.pem")
                value = f"{_PIP}/{key}.pem"
            elif key in _PIP_KEYS:
                mounts |= {path: str(path) for word in value.split() for path in _local(word)}
            else:
                continue
            lines.append(f"{key} = {value}")
        (folder / "pip.conf").write_text("\n".join(lines) + "\n", encoding="utf-8")
        mounts[folder / "pip.conf"] = "/etc/pip.conf"
        return [f"--volume={path}:{place}:ro" for path, place in mounts.items()]


def _pip_settings() -> dict[str, str]:
    """pip's settings by key, those of the environment before those of files."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True, timeout=60
    ).stdout
    found: dict[str, str] = {}
    # ":env:.cert='...'", "global.cert='...'": the order is that of the alphabet, and the environment's come first.
    for line in listed.splitlines():
        name, _, value = line.partition("=")
        found.setdefault(name.rpartition(".")[2], str(ast.literal_eval(value)))
    return found


def _local(word: str) -> list[Path]:
    """The folder or file that has to be mounted for a value of pip's settings."""
    if word.startswith("file://"):
        # The pages of an index point to files beside it.
        path = Path(word.removeprefix("file://")).parent
    else:
        path = Path(word)
    return [path] if path.is_absolute() and path.exists() else []


def _environment(folder: Path) -> dict[str, str]:
    return {
        **os.environ,
        "CONTAINERS_CONF": f"{folder}/containers.conf",
        "CONTAINERS_STORAGE_CONF": f"{folder}/storage.conf",
        "TMPDIR": f"{folder}/tmp",
        MARK: str(folder),
    }


def _tail(output: str) -> str:
    return "\n".join(output.splitlines()[-60:])


def clear(name: str) -> None:
    """End the containers and builds of a folder, and remove it: what :class:`Images` leaves, whatever happened."""
    folder = Path(name)
    for command in (["podman", "rm", "--all", "--force", "--time=0"], ["buildah", "rm", "--all"]):
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(command, env=_environment(folder), capture_output=True, timeout=60, check=False)
    kill_marked(name)
    deadline = time.monotonic() + 30
    # A container's monitor starts another podman after its end, which mounts the images anew.
    while has_left(folder) and time.monotonic() < deadline:
        for process in _processes(folder):
            send(process, signal.SIGKILL)
        for mount in reversed(_mounts(folder)):
            subprocess.run(["umount", "--lazy", mount], capture_output=True, timeout=60, check=False)
        shutil.rmtree(folder, ignore_errors=True)


def has_left(folder: Path) -> list[str]:
    """What is left of a folder: itself, mounts, processes."""
    left = [str(folder)] if folder.exists() else []
    return [*left, *_mounts(folder), *(f"process {number}" for number in _processes(folder))]


def _processes(folder: Path) -> list[int]:
    """Processes that have their root in the folder, and those of containers whose command line names it."""
    found = []
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if process.name.isdigit() and (
                os.readlink(process / "root").startswith(f"{folder}/")
                or (
                    (process / "comm").read_text().strip() in _CONTAINER_PROGRAMS
                    and f"{folder}/" in (process / "cmdline").read_text(errors="replace")
                )
            ):
                found.append(int(process.name))
    return found


def _mounts(folder: Path) -> list[str]:
    places = [line.split()[1] for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()]
    return [place for place in places if place.startswith(f"{folder}/")]


def tool(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a program of this environment, such as ``hadolint``."""
    program = [str(Path(sys.executable).with_name(name)), *(str(word) for word in arguments)]
    return subprocess.run(
        program, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120, check=False
    )


if __name__ == "__main__":
    serve_as_guard(clear)
