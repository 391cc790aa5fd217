"""The Kubernetes manifests: held to the API's schemas, to each other, and executed as two pods would.

No cluster is here: what its controllers do is left out, but for the names, labels and addresses that they give to pods.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubeflow.training import models

from partial_fc.agent import FAILED
from partial_fc.targets import targets_file
from tests.jobs import Job, Jobs, marked_processes
from tests.needs import lacks, need_programs
from tests.nodes import Node, nodes_or_skip
from tests.runs import Run, make_data

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "launch" / "kubernetes"
DOCS = ROOT / "docs" / "kubernetes.md"
IN_IMAGE = "/opt/partial_fc"
# maxFailedIndexes and backoffLimitPerIndex are on since this one; the newest is that of the installed schemas.
VERSIONS = ("1.29", kubernetes_validate.latest_version())
AFTER_RANKS_SECONDS = 20  # what an agent takes after its ranks have ended
SAVED = 75
STEPS = 200
DEADLINE = 180.0
INVALID = (AssertionError, kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError)
Manifest = dict[str, Any]


def read(*names: str) -> list[Manifest]:
    """The documents of manifests."""
    found: list[Manifest] = []
    for name in names:
        found += yaml.safe_load_all((FOLDER / name).read_text(encoding="utf-8"))
    return found


def template_of(workload: Manifest) -> Manifest:
    """The pods of a Job or a PyTorchJob."""
    spec = workload["spec"]
    return spec["template"] if workload["kind"] == "Job" else spec["pytorchReplicaSpecs"]["Worker"]["template"]


def container_of(workload: Manifest) -> Manifest:
    (container,) = template_of(workload)["spec"]["containers"]
    return container


# The schemas.


def misfits(value: Any, kind: str, where: str) -> list[str]:
    """What of a value isn't of a type of Kubeflow's API: keys that it doesn't know, and values of another type."""
    if match := re.fullmatch(r"list\[(.*)\]", kind):
        if not isinstance(value, list):
            return [f"{where}: not a list"]
        return [fault for i, item in enumerate(value) for fault in misfits(item, match[1], f"{where}[{i}]")]
    if match := re.fullmatch(r"dict\(str, (.*)\)", kind):
        if not isinstance(value, dict):
            return [f"{where}: not a mapping"]
        return [fault for key, item in value.items() for fault in misfits(item, match[1], f"{where}.{key}")]
    plain = {"str": str, "int": int, "bool": bool, "object": object}
    if kind in plain:
        return [] if isinstance(value, plain[kind]) else [f"{where}: {value!r} is no {kind}"]
    model = getattr(models, kind)
    if not isinstance(value, dict):
        return [f"{where}: not a mapping"]
    types = {key: model.openapi_types[name] for name, key in model.attribute_map.items()}
    faults = [f"{where}: unknown key {key}" for key in value if key not in types]
    return faults + [
        fault for key in value if key in types for fault in misfits(value[key], types[key], f"{where}.{key}")
    ]


def validate(manifest: Manifest, version: str) -> None:
    """Hold a manifest to the API, strictly: a kind or a key that isn't known is an error, too."""
    if manifest["kind"] == "PyTorchJob":
        assert not misfits(manifest, "KubeflowOrgV1PyTorchJob", "")
        template = template_of(manifest)
        manifest = {"apiVersion": "v1", "kind": "Pod", **template}
    kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", ["storage.yaml", "network.yaml", "job.yaml", "pytorchjob.yaml"])
def test_a_manifest_is_valid(name: str, version: str) -> None:
    for manifest in read(name):
        validate(manifest, version)


def test_every_manifest_is_tested() -> None:
    assert {path.name for path in FOLDER.glob("*.yaml")} == {
        *("storage.yaml", "network.yaml", "job.yaml", "pytorchjob.yaml", "kustomization.yaml")
    }


@pytest.mark.parametrize(
    ("name", "path", "value", "message"),
    [
        ("job.yaml", "spec.complections", 2, "complections"),
        ("job.yaml", "spec.completions", "two", "not of type"),
        ("job.yaml", "spec.template.spec.containers.0.resource", {}, "resource"),
        ("job.yaml", "kind", "Jub", "Couldn't find schema"),
        ("pytorchjob.yaml", "spec.elasticPolicy.minReplica", 1, "unknown key minReplica"),
        ("pytorchjob.yaml", "spec.pytorchReplicaSpecs.Worker.replicas", "2", "'2' is no int"),
        ("pytorchjob.yaml", "spec.pytorchReplicaSpecs.Worker.template.spec.subdomian", "x", "unknown key subdomian"),
        ("pytorchjob.yaml", "spec.pytorchReplicaSpecs.Worker.template.spec.volumes", {}, "volumes: not a list"),
    ],
)
@pytest.mark.parametrize("version", VERSIONS)
def test_a_mistyped_manifest_is_found(name: str, path: str, value: Any, message: str, version: str) -> None:
    broken = changed(read(name)[0], path, value)
    with pytest.raises(INVALID) as found:
        validate(broken, version)
    assert message in (getattr(found.value, "message", None) or str(found.value))


def changed(manifest: Manifest, path: str, value: Any) -> Manifest:
    """A copy with another value at a path."""
    copied = copy.deepcopy(manifest)
    at: Any = copied
    *above, last = path.split(".")
    for key in above:
        at = at[int(key) if isinstance(at, list) else key]
    at[int(last) if isinstance(at, list) else last] = value
    return copied


# What the schemas don't see.


def faults(workload: Manifest, others: list[Manifest]) -> list[str]:
    """What in a Job or PyTorchJob doesn't fit together, or to the Service and the claims beside it."""
    pod, container = template_of(workload)["spec"], container_of(workload)
    labels, ports = template_of(workload)["metadata"]["labels"], {p["name"]: p for p in container["ports"]}
    one = {(other["kind"], other["metadata"]["name"]): other["spec"] for other in others}
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    gpus = int(container["resources"]["limits"]["nvidia.com/gpu"])
    checks: dict[str, bool] = {}
    if workload["kind"] == "Job":
        spec, service = workload["spec"], one.get(("Service", pod.get("subdomain")), {})
        nodes = {str(spec["completions"]), str(spec["parallelism"]), environment["NODES"]}
        checks["the subdomain is a headless Service's name"] = service.get("clusterIP") == "None"
        checks["it publishes pods that aren't ready"] = service.get("publishNotReadyAddresses") is True
        checks["the Service selects the pods"] = labels.items() >= service.get("selector", {"": ""}).items()
        checks["the store is on pod 0"] = environment["HEAD_HOST"] == f"$(JOB_NAME)-0.{pod.get('subdomain')}"
        rendezvous = ports["rendezvous"]["containerPort"]
        ignored = [rule for rule in spec["podFailurePolicy"]["rules"] if rule["action"] == "Ignore"]
        codes = [code for rule in ignored for code in rule.get("onExitCodes", {}).get("values", [])]
        named = {rule["onExitCodes"]["containerName"] for rule in ignored if "onExitCodes" in rule}
        conditions = [each["type"] for rule in ignored for each in rule.get("onPodConditions", [])]
        checks["a run that was saved is no failure"] = codes == [SAVED] and named == {container["name"]}
        final = [rule["onExitCodes"] for rule in spec["podFailurePolicy"]["rules"] if rule["action"] == "FailJob"]
        told = {"containerName": container["name"], "operator": "In", "values": [FAILED]}
        checks["a run that failed for good ends the Job"] = final == [told]
        checks["an eviction is no failure"] = conditions == ["DisruptionTarget"]
        # A pod failure policy takes no other.
        checks["failed pods are made anew"] = pod["restartPolicy"] == "Never" and spec["completionMode"] == "Indexed"
        checks["the probe asks for the run's health"] = container["readinessProbe"]["httpGet"] == {
            "path": "/healthz",
            "port": "metrics-0",
        }
    else:
        spec, elastic = workload["spec"]["pytorchReplicaSpecs"]["Worker"], workload["spec"]["elasticPolicy"]
        nodes = {str(spec["replicas"]), str(elastic["minReplicas"]), str(elastic["maxReplicas"]), environment["NODES"]}
        # The operator's names, and its Services publish ready pods only.
        checks["the store is on pod 0"] = environment["HEAD_HOST"] == "$(JOB_NAME)-worker-0"
        checks["the operator finds container and port"] = container["name"] == "pytorch"
        rendezvous = ports["pytorchjob-port"]["containerPort"]
        checks["pods are ready before they meet"] = "readinessProbe" not in container
        checks["failed pods are made anew"] = spec["restartPolicy"] == "OnFailure"
    # It would end ranks that scan data for an hour; those that hang end themselves.
    checks["no liveness probe"] = not {"livenessProbe", "startupProbe"} & set(container)
    checks["the number of nodes is one"] = len(nodes) == 1
    policy = one.get(("NetworkPolicy", "partial-fc"), {})
    checks["the network policy is the pods'"] = (
        labels.items() >= policy.get("podSelector", {}).get("matchLabels", {"": ""}).items()
    )
    checks["the rendezvous is on torchrun's port"] = rendezvous == int(environment.get("PORT") or 29500)
    metrics = [port["containerPort"] for name, port in ports.items() if name.startswith("metrics-")]
    checks["a metrics port a GPU"] = metrics == list(range(9400, 9400 + gpus))
    scraped = [port for rule in policy.get("ingress", []) for port in rule.get("ports", [])]
    checks["Prometheus reaches all"] = bool(metrics) and any(
        each["port"] <= min(metrics) and max(metrics) <= each["endPort"] for each in scraped
    )
    saving = int(environment["PET_SHUTDOWN_TIMEOUT"] or 30)
    checks["a save fits into the grace period"] = pod["terminationGracePeriodSeconds"] >= saving + AFTER_RANKS_SECONDS
    checks["the user is not root"] = pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
    inside = container["securityContext"]
    checks["no privileges"] = not inside["allowPrivilegeEscalation"] and inside["capabilities"] == {"drop": ["ALL"]}
    checks["no token, no variables of Services"] = not pod["automountServiceAccountToken"] | pod["enableServiceLinks"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    checks["every mount is a volume's"] = {mount["name"] for mount in mounts.values()} == set(volumes)
    shared = volumes[mounts["/dev/shm"]["name"]] if "/dev/shm" in mounts else {}
    checks["shared memory is memory, of a size"] = shared.get("emptyDir", {}).keys() == {"medium", "sizeLimit"}
    checks["what is written is on a volume"] = inside["readOnlyRootFilesystem"] and "/tmp" in mounts
    claims = {v["persistentVolumeClaim"]["claimName"] for v in volumes.values() if "persistentVolumeClaim" in v}
    checks["the claims exist"] = {("PersistentVolumeClaim", claim) for claim in claims} <= set(one)
    checks["they are mounted by many nodes"] = all(
        "ReadWriteMany" in one.get(("PersistentVolumeClaim", claim), {}).get("accessModes", []) for claim in claims
    )
    arguments = dict(argument.split("=", 1) for argument in container["args"][1:])
    folders = [arguments["train.run_dir"], arguments["data.cache"]]
    checks["runs and tables are on a volume that can be written"] = all(
        any(folder == path or folder.startswith(f"{path}/") for path in mounts if not mounts[path].get("readOnly"))
        for folder in folders
    )
    checks["the run has the job's name"] = arguments["train.name"] == "$(JOB_NAME)"
    checks["metrics are served to others, at the pod's address"] = (
        arguments["metrics.address"] == "0.0.0.0" and arguments["metrics.advertise"] == "$(POD_IP)"
    )
    *first, command = container["command"]
    # What buries the dead, and passes signals on: the entry point of the image, which a command takes the place of.
    checks["the first process is an init"] = first == ["tini", "--"]
    file = Path(command.replace(IN_IMAGE, str(ROOT)))
    checks["the command is there"] = file.is_relative_to(ROOT) and os.access(file, os.X_OK)
    checks["the configuration is there"] = (ROOT / container["args"][0]).is_file()
    return [check for check, holds in checks.items() if not holds]


@pytest.mark.parametrize("name", ["job.yaml", "pytorchjob.yaml"])
def test_the_manifests_fit_together(name: str) -> None:
    (workload,) = read(name)
    assert faults(workload, read("storage.yaml", "network.yaml")) == []


POD = "spec.template.spec"


@pytest.mark.parametrize(
    ("path", "value", "fault"),
    [
        (f"{POD}.subdomain", "other", "the subdomain is a headless Service's name"),
        ("spec.template.metadata.labels", {"app": "x"}, "the Service selects the pods"),
        ("spec.parallelism", 4, "the number of nodes is one"),
        ("spec.podFailurePolicy.rules.2.onExitCodes.values", [1], "a run that was saved is no failure"),
        (f"{POD}.terminationGracePeriodSeconds", 150, "a save fits into the grace period"),
        (f"{POD}.securityContext.runAsNonRoot", False, "the user is not root"),
        (f"{POD}.containers.0.volumeMounts.2.mountPath", "/shm", "shared memory is memory, of a size"),
        (f"{POD}.containers.0.volumeMounts.0.readOnly", True, "runs and tables are on a volume that can be written"),
        (f"{POD}.volumes.0.persistentVolumeClaim.claimName", "runs", "the claims exist"),
        (f"{POD}.containers.0.resources.limits", {"nvidia.com/gpu": "4"}, "a metrics port a GPU"),
        (f"{POD}.containers.0.livenessProbe", {"httpGet": {"path": "/", "port": 9400}}, "no liveness probe"),
        (f"{POD}.containers.0.command", ["tini", "--", f"{IN_IMAGE}/launch/pod.sh"], "the command is there"),
        (f"{POD}.containers.0.command", [f"{IN_IMAGE}/launch/kubernetes/pod.sh"], "the first process is an init"),
        (f"{POD}.containers.0.args.0", "configs/glint.yaml", "the configuration is there"),
    ],
)
def test_what_does_not_fit_is_found(path: str, value: Any, fault: str) -> None:
    assert fault in faults(changed(read("job.yaml")[0], path, value), read("storage.yaml", "network.yaml"))


def test_the_two_ways_start_the_same_pods() -> None:
    """But for names that the controllers give, and what ``faults`` says of each."""
    (job,), (other,) = read("job.yaml"), read("pytorchjob.yaml")
    one, two = copy.deepcopy(template_of(job)), copy.deepcopy(template_of(other))
    for template in (one, two):
        (container,) = template["spec"]["containers"]
        container["ports"] = [port["containerPort"] for port in container["ports"]]
        container["env"] = {entry["name"]: entry for entry in container["env"]}
        for given in ("JOB_NAME", "POD_INDEX", "HEAD_HOST"):
            del container["env"][given]
        container.pop("readinessProbe", None)
        for given in ("subdomain", "restartPolicy"):
            template["spec"].pop(given, None)
    assert one == two


# The page.


def block(first_line: str) -> str:
    """The block of the page that begins with this line."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$", DOCS.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    (found,) = (text for text in blocks if text.startswith(first_line))
    return found


def test_the_overlay_of_the_page_makes_a_valid_job(tmp_path: Path) -> None:
    need_programs("kubectl", "kubectl")
    text = block("# kustomization.yaml")
    base = re.search(r"- (\S+/launch/kubernetes)\n", text)
    assert base is not None
    text = text.replace(base[1], os.path.relpath(FOLDER, tmp_path.resolve()))
    (tmp_path / "kustomization.yaml").write_text(text, encoding="utf-8")
    command = ["kubectl", "kustomize", str(tmp_path)]
    made = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert made.returncode == 0, made.stderr
    manifests = list(yaml.safe_load_all(made.stdout))
    for manifest in manifests:
        for version in VERSIONS:
            validate(manifest, version)
    (job,) = (manifest for manifest in manifests if manifest["kind"] == "Job")
    original = read("job.yaml")[0]
    assert faults(job, read("storage.yaml", "network.yaml")) == []
    assert job["metadata"]["name"] != original["metadata"]["name"] and job["metadata"]["namespace"]
    assert container_of(job)["image"] != "partial-fc" and job["spec"]["completions"] != 2
    assert len(container_of(job)["args"]) > len(container_of(original)["args"])


def test_the_scrape_configuration_of_the_page_finds_the_ranks(tmp_path: Path) -> None:
    """Discovery itself is left out: Debian's Prometheus is built without it. Its labels come from the manifest."""
    need_programs("prometheus", "promtool")
    (job,) = read("job.yaml")
    ports = {port["name"]: port["containerPort"] for port in container_of(job)["ports"]}
    found = {
        "__meta_kubernetes_pod_phase": "Running",
        "__meta_kubernetes_pod_label_job_name": job["metadata"]["name"],
        "__meta_kubernetes_pod_annotation_batch_kubernetes_io_job_completion_index": "1",
    }
    pods = [
        {"targets": [f"10.1.2.3:{port}"], "labels": {**found, "__meta_kubernetes_pod_container_port_name": name}}
        for name, port in ports.items()
    ]
    done = copy.deepcopy(pods[-1])
    done["labels"]["__meta_kubernetes_pod_phase"] = "Succeeded"
    content = yaml.safe_load(block("# prometheus.yml"))
    (scrape,) = content["scrape_configs"]
    (discovery,) = scrape.pop("kubernetes_sd_configs")
    key, _, value = discovery["selectors"][0]["label"].partition("=")
    assert template_of(job)["metadata"]["labels"][key] == value
    scrape["static_configs"] = [*pods, done]
    path = tmp_path / "prometheus.yml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    command = ["promtool", "check", "service-discovery", "--timeout", "2s", str(path), scrape["job_name"]]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert told.returncode == 0, told.stderr
    targets = [each["labels"] for each in json.loads(told.stdout) if each["labels"]]
    ranks = {each["__address__"]: (each.get("run"), each.get("rank")) for each in targets}
    assert ranks == {f"10.1.2.3:{9400 + gpu}": ("glint360k-r100", f"1-{gpu}") for gpu in range(8)}


# Two pods.


class Pod:
    """A pod of a Job or PyTorchJob on a node: its container's command, and what the cluster gives to it.

    Args:
        workload: the manifest.
        index: of the pod.
        node: where it is.
        folders: of this machine, by the path where a volume is mounted.
    """

    def __init__(self, workload: Manifest, index: int, node: Node, folders: dict[str, Path]) -> None:
        name, job = workload["metadata"]["name"], workload["kind"] == "Job"
        self.node, self.host = node, f"{name}-{index}" if job else f"{name}-worker-{index}"
        # A Job's pods have names of their domain; the operator makes a Service for each of its pods.
        self.dns = f"{self.host}.{template_of(workload)['spec']['subdomain']}" if job else self.host
        given = {"status.podIP": node.address}
        if job:
            given["metadata.labels['batch.kubernetes.io/job-name']"] = name
            given["metadata.annotations['batch.kubernetes.io/job-completion-index']"] = str(index)
        else:
            given["metadata.labels['training.kubeflow.org/job-name']"] = name
            given["metadata.labels['training.kubeflow.org/replica-index']"] = str(index)
        container = container_of(workload)
        self.environment: dict[str, str] = {}
        for entry in container["env"]:
            value = given[entry["valueFrom"]["fieldRef"]["fieldPath"]] if "valueFrom" in entry else entry["value"]
            self.environment[entry["name"]] = self._expand(value)
        self._folders = {IN_IMAGE: ROOT, **folders}
        # Without the init, which is the image's: here it's no container's first process.
        self.command = [self._place(self._expand(word)) for word in container["command"][2:]]
        self.arguments = [self._place(self._expand(word)) for word in container["args"]]
        only_read = [mount["mountPath"] for mount in container["volumeMounts"] if mount.get("readOnly")]
        read_only = [shlex.quote(str(folders[path])) for path in only_read]
        lines = [f"mount --bind {path} {path} && mount -o remount,ro,bind {path}" for path in read_only]
        # What kubelet writes into a pod's file; the file is the node's own.
        own = f"{node.address} {self.dns}.default.svc.cluster.local {self.host}"
        lines += [f"cd {self._place(container['workingDir'])}", f"hostname {self.host}", "grep -q node0 /etc/hosts"]
        lines += [f"echo '{own}' >> /etc/hosts", 'exec "$0" "$@"']
        self.prefix = [*node.command, "sh", "-c", " && ".join(lines)]

    def _expand(self, text: str) -> str:
        """As kubelet does it; it leaves a name that it doesn't know as it is, which here is an error."""
        return re.sub(r"\$\((\w+)\)", lambda match: self.environment[match[1]], text)

    def _place(self, text: str) -> str:
        """A path in the container as the one on this machine."""
        known = "|".join(re.escape(path) for path in self._folders)
        return re.sub(rf"(^|=)({known})(?=/|$)", lambda match: f"{match[1]}{self._folders[match[2]]}", text)

    def publish(self, nodes: list[Node], address: str) -> None:
        """Tell the nodes where it is, as the cluster's name service does."""
        # Nothing is written where it's another file than the node's.
        script = 'grep -q node0 /etc/hosts || exit; grep -v " $1 *$" /etc/hosts > "$2"; echo "$0 $1" >> "$2"'
        script += '; cat "$2" > /etc/hosts'
        for node in nodes:
            if node is self.node and self.dns == self.host:
                continue
            new = self._folders["/tmp"] / f"hosts-{node.host}"
            subprocess.run([*node.command, "sh", "-c", script, address, self.dns, str(new)], check=True, timeout=60)


@pytest.fixture
def nodes() -> Iterator[list[Node]]:
    with nodes_or_skip(2) as made:
        yield made


@pytest.fixture
def jobs(tmp_path: Path, nodes: list[Node]) -> Iterator[Jobs]:
    # After the nodes, so that the processes on them end before they are taken down.
    with Jobs(tmp_path) as opened:
        yield opened


class Cluster:
    """A workload of two pods that trains a small run on the CPU."""

    def __init__(self, workload: Manifest, jobs: Jobs, nodes: list[Node], folder: Path, steps: int) -> None:
        self._jobs, self._nodes = jobs, nodes
        folders = {f"/{name}": folder / name for name in ("runs", "data", "tmp")}
        for path in folders.values():
            path.mkdir()
        self.pods = [Pod(workload, index, node, folders) for index, node in enumerate(nodes)]
        # The place that the manifest gives to the data.
        (place,) = (argument for argument in self.pods[0].arguments if argument.startswith("data.path="))
        data = make_data(Path(place.removeprefix("data.path=")))
        self.run = Run(folder, data, name=workload["metadata"]["name"], steps=steps, commit_every=4)
        # As the commands that the image has on its path.
        self._path = f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}"

    def start(self) -> list[Job]:
        return [self._start(pod) for pod in self.pods]

    def _start(self, pod: Pod) -> Job:
        arguments = [str(self.run.config), *pod.arguments[1:], "metrics.enabled=true"]
        environment = {**pod.environment, "PATH": self._path, "RANKS": "1", "HOME": str(self.run.config.parent)}
        return self._jobs.start(pod.host, [*pod.command, *arguments], environment, pod.prefix)

    def publish(self, address: str | None = None) -> None:
        for pod in self.pods:
            pod.publish(self._nodes, address or pod.node.address)


@pytest.mark.slow
@pytest.mark.torchrun
@pytest.mark.timeout(500)
def test_two_pods_of_the_job_train_are_evicted_and_go_on(jobs: Jobs, nodes: list[Node], tmp_path: Path) -> None:
    (workload,) = read("job.yaml")
    cluster = Cluster(workload, jobs, nodes, tmp_path, steps=STEPS)
    run = cluster.run
    # The names are those of pods that are gone.
    cluster.publish("10.199.7.99")
    pods = cluster.start()
    for pod in pods:
        jobs.wait_until(lambda pod=pod: waits(pod), f"{pod.name} to wait for pod 0", DEADLINE)
    assert not run.folder.exists()
    cluster.publish()
    jobs.wait_until(lambda: run.newest_commit() >= 8, "a commit", DEADLINE)
    targets = json.loads(targets_file(run.folder).read_text(encoding="utf-8"))
    assert [each["targets"] for each in targets] == [[f"{node.address}:9400"] for node in nodes]
    pods[1].signal(signal.SIGTERM)
    # The exit code that the Job's policy makes no failure of, on both: 0 would be a pod that is done.
    assert [pod.wait(DEADLINE) for pod in pods] == [SAVED, SAVED]
    saved = run.status["step"]
    assert run.status["state"] == "resume" and 8 <= saved < STEPS
    for pod in cluster.start():
        pod.succeed(DEADLINE)
    assert run.status["state"] == "finished" and sorted(run.losses()) == list(range(1, STEPS + 1))
    assert [line["step"] for line in run.lines("resumed")] == [saved]


@pytest.mark.slow
@pytest.mark.torchrun
@pytest.mark.timeout(500)
def test_two_pods_of_the_pytorchjob_train(jobs: Jobs, nodes: list[Node], tmp_path: Path) -> None:
    (workload,) = read("pytorchjob.yaml")
    cluster = Cluster(workload, jobs, nodes, tmp_path, steps=6)
    cluster.publish()
    for pod in cluster.start():
        pod.succeed(DEADLINE)
    assert cluster.run.status["state"] == "finished" and cluster.run.status["world_size"] == 2


@pytest.mark.parametrize("index", ["0", "1"])
def test_a_pod_that_waits_ends_on_a_signal(index: str, tmp_path: Path) -> None:
    """As the first process of its container, whose signals do nothing unless they are handled."""
    # Nobody answers there, and it is not this pod's address.
    given = {"HEAD_HOST": "127.0.0.1", "PORT": "1", "POD_INDEX": index, "POD_IP": "10.1.2.3"}
    with Jobs(tmp_path) as jobs:
        apart = ["unshare", "--pid", "--fork", "--kill-child"]
        pod = jobs.start("pod", [*apart, str(FOLDER / "pod.sh"), "any.yaml"], {**given, "NODES": "2"})
        jobs.wait_until(lambda: pod.returncode is not None or waits(pod), "the pod to wait", DEADLINE)
        if "Operation not permitted" in pod.output:
            lacks("namespaces", pod.output)
        (first,) = (process.pid for process in marked_processes(pod.mark) if process.parent == pod.pid)
        os.kill(first, signal.SIGTERM)
        assert pod.wait(DEADLINE) == 143


def waits(pod: Job) -> bool:
    """Whether it is in the loop of pod.sh, by what that executes."""
    assert pod.returncode is None or "Operation not permitted" in pod.output, f"{pod.name} ended: {pod.output}"
    names = set()
    for process in marked_processes(pod.mark):
        with contextlib.suppress(OSError):
            names.add(Path(f"/proc/{process.pid}/comm").read_text().strip())
    return bool(names & {"sleep", "timeout"})
