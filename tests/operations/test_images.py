"""The image and the compose files: what is wrong with them by their rules, and whether a built image trains.

The image is really built, by buildah, and run, by podman. What is different from a build with Docker: the base image is
a Debian that mmdebstrap makes here, as no registry can be reached; torch is the build that pip finds here (for CPUs);
DALI and matplotlib are left out, which the trainings here don't use.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import requires, version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from prometheus_client import CollectorRegistry

from partial_fc.config import load_config
from partial_fc.metrics_server import MetricsServer, Tls
from tests.images import ROOT, Images, has_left, tool
from tests.jobs import JobFailed
from tests.pems import make_pair
from tests.runs import Run, make_data

DOCKER = ROOT / "docker"
IMAGE = "localhost/partial-fc"
COMPOSE = DOCKER / "compose.yaml"
GPU = DOCKER / "compose.gpu.yaml"
# What a code change may add to what has to be sent to each machine.
MOST_OF_A_CHANGE = 8 << 20


def script(name: str) -> ModuleType:
    """A script of docker/ as a module."""
    spec = importlib.util.spec_from_file_location(name, DOCKER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_hadolint_finds_nothing_wrong_with_the_dockerfile(tmp_path: Path) -> None:
    found = tool("hadolint", DOCKER / "Dockerfile")
    assert found.returncode == 0, found.stdout
    # And it would: the last user is root.
    broken = tmp_path / "Dockerfile"
    broken.write_text((DOCKER / "Dockerfile").read_text(encoding="utf-8").replace("USER 1000:1000", "USER root"))
    found = tool("hadolint", broken)
    assert found.returncode != 0 and "DL3002" in found.stdout


def test_compose_files_follow_the_specification(tmp_path: Path) -> None:
    def check(*files: Path) -> subprocess.CompletedProcess[str]:
        return tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", *files)

    found = check(COMPOSE, GPU)
    assert found.returncode == 0, found.stdout
    broken = tmp_path / "compose.yaml"
    broken.write_text(COMPOSE.read_text(encoding="utf-8").replace("stop_grace_period", "stop_grace_time"))
    found = check(broken)
    assert found.returncode != 0 and "stop_grace_time" in found.stdout


def services() -> dict[str, dict[str, Any]]:
    """The services of compose.yaml."""
    found: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["services"]
    return found


def test_composed_services_are_shut_in() -> None:
    for name, service in services().items():
        assert service["cap_drop"] == ["ALL"] and "no-new-privileges:true" in service["security_opt"], name
        assert not {"privileged", "cap_add", "pid", "ipc", "user"} & service.keys(), name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        if "build" not in service:
            version = service["image"].rpartition(":")[2]
            assert version.removeprefix("v").count(".") == 2, f"{name}: {service['image']} isn't one version"
    assert services()["prometheus"]["volumes"][1] == "runs:/runs:ro"


def test_composed_files_are_there_and_volumes_are_declared() -> None:
    declared = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["volumes"].keys()
    for name, service in services().items():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert (DOCKER / source).is_dir() if source.startswith(".") else source in declared, f"{name}: {volume}"
    # Where the dashboards lie is said three times.
    grafana = services()["grafana"]
    provider = yaml.safe_load((DOCKER / "grafana/provisioning/dashboards/partial_fc.yml").read_text(encoding="utf-8"))
    folder = provider["providers"][0]["options"]["path"]
    assert f"./grafana/dashboards:{folder}:ro" in grafana["volumes"]
    home = Path(grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert str(home.parent) == folder and (DOCKER / "grafana/dashboards" / home.name).is_file()


def test_composed_trainer_and_those_who_watch_it_agree() -> None:
    trainer = services()["trainer"]
    launcher, config, *overrides = trainer["command"]
    assert (ROOT / launcher).is_file()
    settings = load_config(ROOT / config, overrides)
    # The name of a service is its address.
    assert settings.metrics.advertise == "trainer" and settings.metrics.address == "0.0.0.0"
    drawn = services()["data"]["command"][-1]
    assert drawn == f"/{settings.data.path}"
    wait = int(trainer["environment"]["PET_SHUTDOWN_TIMEOUT"])
    assert int(trainer["stop_grace_period"].removesuffix("s")) > wait + 10
    source = yaml.safe_load((DOCKER / "grafana/provisioning/datasources/prometheus.yml").read_text(encoding="utf-8"))
    assert source["datasources"][0]["url"] == "http://prometheus:9090"
    scraped = yaml.safe_load((DOCKER / "prometheus/prometheus.yml").read_text(encoding="utf-8"))["scrape_configs"][0]
    assert scraped["file_sd_configs"][0]["files"] == ["/runs/targets/*.json"]


def test_gpus_are_given_to_services_that_exist() -> None:
    content = yaml.safe_load(GPU.read_text(encoding="utf-8"))
    assert content["services"].keys() <= services().keys()
    assert content["services"]["trainer"]["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == [
        "gpu"
    ]
    images = {service["image"] for service in content["services"].values()}
    assert len(images) == 1 and services()["trainer"]["image"] not in images


def test_what_an_image_installs_changes_with_what_it_needs_only() -> None:
    pytest.importorskip("tomllib", reason="Python 3.11 has it; the image's is 3.11")
    sort: Callable[..., dict[str, list[str]]] = script("requirements").sort
    pyproject, constraints = [
        (ROOT / name).read_text(encoding="utf-8") for name in ("pyproject.toml", "constraints.txt")
    ]
    files = sort(pyproject, constraints, ["plot"])
    assert [line.split("==")[0] for line in files["torch.txt"]] == ["torch"]
    named = " ".join(files["others.txt"])
    assert "matplotlib" in named and "pydantic" in named and "pytest" not in named and "dali" not in named
    assert not any(line.startswith(("pytest", "nvidia-dali")) for line in files["constraints.txt"])
    # Another test tool, another rule of the linter: nothing is built anew.
    assert (
        sort(pyproject.replace("line-length", "line-width"), constraints.replace("pytest==", "pytest==1"), ["plot"])
        == files
    )
    # Another pydantic: torch stays, and so does what builds the package.
    other = sort(pyproject, constraints.replace("pydantic==", "pydantic==1"), ["plot"])
    assert [name for name in files if other[name] != files[name]] == ["constraints.txt"]


def test_all_that_an_image_installs_is_pinned() -> None:
    pytest.importorskip("tomllib", reason="Python 3.11 has it; the image's is 3.11")
    requirements = script("requirements")
    pyproject, constraints = [
        (ROOT / name).read_text(encoding="utf-8") for name in ("pyproject.toml", "constraints.txt")
    ]
    files = requirements.sort(pyproject, constraints, ["dali-cuda130", "plot"])
    for kind, wanted in (("build-", files["build.txt"]), ("torch-", files["torch.txt"]), ("", files["others.txt"])):
        pins = files[f"{kind}constraints.txt"]
        assert all(re.match(r"[\w.-]+==[\w.!]+(; python_version >= \"3\.11\")?$", pin) for pin in pins), kind
        names = [canonicalize_name(Requirement(pin).name) for pin in pins]
        assert len(names) == len(set(names)), f"{kind}constraints.txt has a name twice"
        first = {canonicalize_name(Requirement(line).name) for line in files["torch.txt"]}
        assert floating(wanted) - {*names, *first} == set(), f"{kind}constraints.txt lacks pins"
    # The list of what is in torch's layer is complete, with what only builds for CUDA need.
    cuda = {"cuda-bindings", "cuda-pathfinder", "nvidia-nvjitlink", "triton"}
    assert requirements.NEEDED_BY_TORCH - cuda == floating(["torch"]) - {"torch"} - cuda
    pinned = {canonicalize_name(Requirement(pin).name) for pin in files["torch-constraints.txt"]}
    assert pinned == requirements.NEEDED_BY_TORCH


def floating(wanted: list[str]) -> set[str]:
    """What requirements bring here, themselves included, unless who needs it names one version."""
    found: set[str] = set()
    seen: set[tuple[str, str]] = set()
    ahead = [Requirement(line) for line in wanted]
    while ahead:
        needed = ahead.pop()
        name = canonicalize_name(needed.name)
        if not any(clause.operator == "==" for clause in needed.specifier):
            found.add(name)
        # An extra brings what the package alone doesn't.
        for extra in {"", *needed.extras} - {extra for of, extra in seen if of == name}:
            seen.add((name, extra))
            ahead += [
                of_it
                for of_it in map(Requirement, requires(name) or [])
                if of_it.marker is None or of_it.marker.evaluate({"extra": extra})
            ]
    return found


def test_requirements_that_cannot_be_are_refused() -> None:
    pytest.importorskip("tomllib", reason="Python 3.11 has it; the image's is 3.11")
    sort = script("requirements").sort
    pyproject, constraints = [
        (ROOT / name).read_text(encoding="utf-8") for name in ("pyproject.toml", "constraints.txt")
    ]
    with pytest.raises(ValueError, match="EXTRAS has dali, expected some of dali-cuda130"):
        sort(pyproject, constraints, ["dali"])
    with pytest.raises(ValueError, match="no line for torch, expected one line, torch==VERSION"):
        sort(pyproject, constraints.replace("torch==", "tensor=="), [])


def health(url: str, **environment: str) -> tuple[int, str]:
    """Exit code and line of the health check."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(DOCKER / "healthcheck.py")],
        env={"HEALTH_URL": url, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert not done.stderr, done.stderr
    return done.returncode, done.stdout


@contextlib.contextmanager
def served(trouble: str | None = None, tls: Tls | None = None) -> Iterator[MetricsServer]:
    server = MetricsServer(CollectorRegistry(), port=0, tls=tls, healthy=lambda: trouble)
    server.start()
    try:
        yield server
    finally:
        server.close()


def test_health_check_says_what_the_endpoint_says() -> None:
    with served() as server:
        # A proxy for all has nothing to do with it.
        asked = health(f"http://127.0.0.1:{server.port}/healthz", http_proxy="http://127.0.0.1:9", all_proxy="x")
        assert asked == (0, "ok\n")
        assert health(f"http://127.0.0.1:{server.port}/nothing") == (
            1,
            "404: nothing is here: the metrics are at /metrics\n",
        )
    with served("no progress for 31 s") as server:
        assert health(f"http://127.0.0.1:{server.port}/healthz") == (1, "503: no progress for 31 s\n")


def test_health_check_of_an_encrypted_endpoint(tmp_path: Path) -> None:
    own, client = make_pair(tmp_path, "server"), make_pair(tmp_path, "client")
    both = tmp_path / "both.pem"
    both.write_bytes(client.certificate.read_bytes() + client.key.read_bytes())
    with served(tls=Tls(str(own.certificate), str(own.key), str(client.certificate))) as server:
        url = f"https://127.0.0.1:{server.port}/healthz"
        assert health(url, HEALTH_CERTIFICATE=str(both)) == (0, "ok\n")
        code, line = health(url)
        assert code == 1 and "doesn't answer" in line
        code, line = health(url, HEALTH_CERTIFICATE=str(tmp_path / "missing.pem"))
        assert code == 1 and "missing.pem" in line


def test_health_check_where_nothing_answers() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        code, line = health(f"http://127.0.0.1:{unused.getsockname()[1]}/healthz")
    assert code == 1 and "doesn't answer" in line and "refused" in line
    for url in ("nonsense", "http://127.0.0.1:port/healthz"):
        code, line = health(url)
        assert code == 1 and url in line


def test_health_check_of_a_port_that_speaks_something_else() -> None:
    # A greeting, an answer that breaks off within its chunks, and no answer at all.
    broken = b"HTTP/1.1 %s\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nok"
    for said, told in (
        (b"SSH-2.0-OpenSSH_9.2\r\n", "SSH-2.0"),
        (broken % b"200 OK", "IncompleteRead"),
        (broken % b"503 No", "IncompleteRead"),
        (b"", "closed"),
    ):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.settimeout(60)
            answering = threading.Thread(target=_answer, args=(listener, said))
            answering.start()
            code, line = health(f"http://127.0.0.1:{listener.getsockname()[1]}/healthz")
            answering.join()
        assert code == 1 and "doesn't answer" in line and told in line and line.count("\n") == 1, line


def _answer(listener: socket.socket, said: bytes) -> None:
    connection, _ = listener.accept()
    with connection:
        # The question is read, so that closing isn't a reset.
        connection.recv(65536)
        connection.sendall(said)


def test_demonstration_data_that_cannot_be_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main = script("demo_data").main

    def draw(*arguments: str | Path) -> None:
        monkeypatch.setattr(sys, "argv", ["demo_data.py", *map(str, arguments)])
        main()

    for arguments in ((), (tmp_path, "more")):
        with pytest.raises(SystemExit, match=f"^error: got {len(arguments)} arguments, expected one, .* FOLDER$"):
            draw(*arguments)
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    with pytest.raises(SystemExit, match=f"^error: can't write a data set to {tmp_path}/file/demo: "):
        draw(tmp_path / "file" / "demo")
    capsys.readouterr()
    # One that is there stays.
    (tmp_path / "train.idx").write_text("", encoding="utf-8")
    draw(tmp_path)
    assert capsys.readouterr().out == f"{tmp_path} holds a data set already\n"


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files that the image may be made of, and a few that must not get into it."""
    folder = tmp_path_factory.mktemp("context")
    for name in ("LICENSE", "README.md", "pyproject.toml", "constraints.txt", ".dockerignore"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("partial_fc", "launch", "configs", "docker"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("data/secret", "launch/__pycache__/secret", "docker/secret", "secret"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("not for others", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def images(context: Path) -> Iterator[Images]:
    """The built image, as :data:`IMAGE`."""
    with Images() as images:
        images.make_base()
        images.build(context, IMAGE, EXTRAS="", REVISION="0123abc")
        yield images
    assert not has_left(images.folder)


class Training:
    """A run in containers of the image, by a user without a name, with nothing but the image, the data and a folder."""

    def __init__(self, images: Images, folder: Path) -> None:
        self.images = images
        self.run = Run(folder, make_data(folder / "data"), steps=100_000, commit_every=1000)
        self.run.folder.parent.mkdir()
        self.run.folder.parent.chmod(0o777)
        self._folder = folder

    def start(self, name: str, *overrides: str) -> None:
        """Start two ranks, in the background."""
        limits = [
            "--network=none",
            "--read-only",
            "--tmpfs=/tmp:exec,mode=1777",
            "--cap-drop=all",
            "--user=12345:54321",
        ]
        limits += ["--security-opt=no-new-privileges", "--stop-timeout=60"]
        volumes = [f"--volume={self._folder}/data:/data:ro", f"--volume={self._folder}/runs:/runs"]
        volumes += [f"--volume={self.run.config}:/run.yaml:ro"]
        places = ["data.path=/data", "data.cache=/runs/.tables", "train.run_dir=/runs", "metrics.enabled=true"]
        command = ["launch/single_node.sh", "/run.yaml", *places, *overrides]
        self.images.run("podman", "run", "--detach", f"--name={name}", *limits, *volumes, IMAGE, *command, timeout=60)

    def log(self, name: str) -> str:
        """The last lines that the container printed."""
        return self.images.run("podman", "logs", "--tail=60", name, timeout=60).stdout

    def wait_until(self, name: str, condition: Callable[[], object], what: str, timeout: float = 180) -> None:
        """Wait for something of a container that runs."""
        deadline = time.monotonic() + timeout
        while not condition():
            ended = self.exit_code(name)
            if ended is not None or time.monotonic() > deadline:
                raise JobFailed(f"{name} ended ({ended}) or is late, waiting for {what}\n{self.log(name)}")
            time.sleep(0.2)

    def exit_code(self, name: str) -> int | None:
        """The container's, None while it runs."""
        state = json.loads(self.images.run("podman", "inspect", "--format={{json .State}}", name, timeout=60).stdout)
        return None if state["Running"] else state["ExitCode"]


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_image_built_on_a_stub_of_the_base_trains_saves_on_a_signal_and_goes_on(images: Images, tmp_path: Path) -> None:
    training = Training(images, tmp_path)
    training.start("first")

    def healthy() -> bool:
        done = images.run("podman", "healthcheck", "run", "first", timeout=60, ok=False)
        assert done.returncode in (0, 1), done.stdout
        return done.returncode == 0

    # The endpoint isn't there yet.
    assert not healthy()
    training.wait_until("first", healthy, "its health")
    training.wait_until("first", lambda: len(training.run.lines("train")) > 5, "a few steps")
    images.run("podman", "stop", "first", timeout=90)
    assert training.exit_code("first") == 75, training.log("first")
    status = training.run.status
    assert (status["state"], status["world_size"]) == ("resume", 2) and status["committed"] == status["step"] > 5
    # Written by the user whom the container had.
    owner = (training.run.folder / "status.json").stat()
    assert (owner.st_uid, owner.st_gid) == (12345, 54321)

    training.start("second", f"train.steps={status['step'] + 5}")
    with contextlib.suppress(JobFailed):
        training.wait_until("second", lambda: False, "its end")
    assert training.exit_code("second") == 0, training.log("second")
    assert training.run.status["state"] == "finished"
    (resumed,) = training.run.lines("resumed")
    assert resumed["step"] == status["step"]


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_image_holds_what_it_should_and_no_more(images: Images) -> None:
    config = images.config(IMAGE)
    assert config["User"] == "1000:1000" and config["Entrypoint"] == ["tini", "--"] and "Volumes" not in config
    assert config["Labels"]["org.opencontainers.image.revision"] == "0123abc"
    assert config["Healthcheck"]["Test"][0] == "CMD"

    def within(*words: str, user: str = "12345:0") -> str:
        options = ["--rm", "--network=none", f"--user={user}", "--no-healthcheck"]
        return images.run("podman", "run", *options, IMAGE, *words, timeout=120).stdout

    # The entry alone: what there is to do.
    assert "Train and evaluate classifiers" in within()
    names = ["*/secret", "*/site-packages/pip", "*/.cache/*", "/var/lib/apt/lists/*", "/tools", "/source", "/wheels"]
    search = " -o ".join(f"-path {name}" for name in names)
    assert within("find", "/", "-xdev", *search.split(), user="0:0").split() == []
    # It does find what is there.
    assert within("find", "/opt", "-path", "*/single_node.sh").split() == ["/opt/partial_fc/launch/single_node.sh"]
    # Nothing of the program is its user's to change; runs and data are.
    writable = within("find", "/opt", "/usr", "/runs", "/data", "-type", "d", "-writable")
    assert writable.split() == ["/runs", "/data"]
    # Packages have the versions of constraints.txt, all of them. A build of torch's adds its name to the version.
    program = (
        "from importlib.metadata import distributions as all; "
        "print(*(f'{one.name}=={one.version}'.partition('+')[0] for one in all()))"
    )
    versions = {canonicalize_name(word.partition("==")[0]): word for word in within("python", "-c", program).split()}
    assert len(versions) > 20 and versions.pop("partial-fc")
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.partition(";")[0].partition("==") for line in lines if "==" in line and not line.startswith("#")]
    pinned = {canonicalize_name(name): pin for name, _, pin in pins}
    assert {name: word.partition("==")[2] for name, word in versions.items()} == {
        name: pinned.get(name) for name in versions
    }
    # Kernels can be compiled, without a name or a home.
    program = "from partial_fc.kernels.compiled import works; print('works', works('cpu'))"
    assert "works True" in within("python", "-c", program)
    # Compiled files that stay valid when they are copied: flags 1, an unchecked hash.
    program = "import torch, pathlib; print('flags', pathlib.Path(torch.__cached__).read_bytes()[4])"
    assert "flags 1" in within("python", "-c", program)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_code_change_adds_a_small_layer(images: Images, context: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(context, changed)
    with (changed / "partial_fc" / "errors.py").open("a", encoding="utf-8") as file:
        file.write("\n# changed\n")
    # A new version of a test tool is no reason, either.
    constraints = (changed / "constraints.txt").read_text(encoding="utf-8")
    (changed / "constraints.txt").write_text(constraints.replace("pytest==", "pytest==1"), encoding="utf-8")
    printed = images.build(changed, f"{IMAGE}:changed", EXTRAS="", REVISION="0123abc")
    # What isn't needed isn't done: no other package is installed, nothing is downloaded.
    assert re.findall(r"^Successfully installed (.*)$", printed, re.MULTILINE) == [
        f"partial-fc-{version('partial-fc')}"
    ]
    assert "Downloading" not in printed and "Get:1" not in printed
    before, after = images.layers(IMAGE), images.layers(f"{IMAGE}:changed")
    assert before != after and len(before) == len(after)
    different = [number for number, pair in enumerate(zip(before, after, strict=True)) if pair[0] != pair[1]]
    sizes = images.layer_bytes(f"{IMAGE}:changed")
    print(f"layers in bytes: {sizes}, of which anew: {different}")
    assert sum(sizes[number] for number in different) < MOST_OF_A_CHANGE < sum(sizes) / 20
