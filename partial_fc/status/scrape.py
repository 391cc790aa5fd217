"""Ask the ranks' endpoints, all at once and never for long.

What answers is another process: its text is parsed and nothing else, its length is bounded, and it gets a password only
by the rules of :func:`read_access`.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import os
import queue
import re
import ssl
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO, Any, NamedTuple

from prometheus_client.parser import text_string_to_metric_families

from partial_fc.certificates import first_line
from partial_fc.status.following import open_file
from partial_fc.status.words import number, plain

CONNECT_SECONDS = 2.0
ALL_SECONDS = 6.0
_THREADS = 64
_MOST_BYTES = 1 << 23
_PEM_BYTES = 1 << 20
_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)
_PREFIX = "partial_fc_"

# By a metric's name without its prefix, and the value of its label beside `le` ("" where it has none).
Values = dict[tuple[str, str], float]


class Access(NamedTuple):
    """What the endpoints of a run ask for.

    Attributes:
        certificate: PEM file of the endpoint, as the run has it; None: unknown.
        key: its private key, shown where a client certificate is asked for; None: none is shown.
        user: of HTTP's basic authentication; None: no password is sent.
        password: of it.
        problem: why a password or key isn't used, in words.
    """

    certificate: str | None = None
    key: str | None = None
    user: str | None = None
    password: str | None = None
    problem: str | None = None


class Answer(NamedTuple):
    """What came of asking a rank.

    Attributes:
        rank: by the file of targets; -1 where that names none.
        address: ``host:port``.
        values: of its metrics; None where it doesn't answer.
        problem: why not, in words.
    """

    rank: int
    address: str
    values: Values | None
    problem: str | None = None

    def get(self, name: str, label: str = "") -> float | None:
        """A value; None where it isn't there or isn't known yet."""
        value = (self.values or {}).get((name, label))
        return number(value)

    def by_label(self, name: str) -> dict[str, float]:
        """The known values of a metric by its label."""
        values = self.values or {}
        return {label: value for (of, label), value in values.items() if of == name and number(value) is not None}


def read_access(section: Any, owners: Mapping[str, int]) -> Access:
    """What ``config.yaml``'s section ``metrics`` says of how the endpoints are read.

    A file with a secret is used only where each file that leads to it, or says whom it is sent, belongs to the one who
    asks or to the owner of the secret: nobody shall have the secrets of others sent to a port of his.

    Args:
        section: the section, of whatever type it is.
        owners: users' numbers by the names of these files, of the very files that were read.
    """
    if not isinstance(section, Mapping):
        return Access()
    text = {key: value if isinstance(value, str) else None for key, value in section.items() if isinstance(key, str)}
    certificate, key, user = text.get("tls_certificate"), text.get("tls_key"), text.get("user")
    problems, password = [], None
    if key is not None and text.get("tls_client_ca") is not None:
        try:
            with _own(key, owners):
                pass
        except (OSError, ValueError) as error:
            problems.append(f"metrics.tls_key isn't used: {_reason(error)}")
            key = None
    else:
        key = None
    if user is not None and (file := text.get("password_file")) is not None:
        try:
            with _own(file, owners) as opened:
                password = first_line(opened.readline(4096))
        except (OSError, ValueError) as error:
            problems.append(f"metrics.password_file isn't used: {_reason(error)}")
    return Access(certificate, key, user, password, "; ".join(problems) or None)


def _own(file: str, owners: Mapping[str, int]) -> IO[bytes]:
    """Open a file with a secret.

    Raises:
        PermissionError: one of those who lead to it has no right to it.
    """
    opened = open_file(file)
    try:
        entitled = os.geteuid(), os.fstat(opened.fileno()).st_uid
        for name, owner in owners.items():
            if owner not in entitled:
                raise PermissionError(f"{name} belongs to another user, who doesn't own that file")
    except OSError:
        opened.close()
        raise
    return opened


def scrape(targets: Sequence[Mapping[str, Any]], access: Access, seconds: float = ALL_SECONDS) -> list[Answer]:
    """Ask all endpoints at once.

    Args:
        targets: as :func:`partial_fc.targets.read_targets` returns them.
        access: what they ask for.
        seconds: for all of it; who didn't answer by then counts as one that doesn't.

    Returns:
        By rank, one answer for each target.
    """
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for place in range(len(targets)):
        waiting.put(place)
    deadline = time.monotonic() + seconds
    done: dict[int, Answer] = {}
    ended = threading.Semaphore(0)
    contexts = _Contexts(access)

    def work() -> None:
        with contextlib.suppress(queue.Empty):
            while time.monotonic() < deadline:
                place = waiting.get_nowait()
                done[place] = _ask(targets[place], access, contexts, deadline)
        ended.release()

    # Daemons: one that hangs in a name's resolution shall not keep the program from ending.
    threads = min(_THREADS, len(targets))
    for _ in range(threads):
        threading.Thread(target=work, name="status-scrape", daemon=True).start()
    for _ in range(threads):
        ended.acquire(timeout=max(0.0, deadline - time.monotonic()))
    answers = [
        done.get(place) or Answer(_rank(target), _address(target), None, f"no answer in {seconds:g} s")
        for place, target in enumerate(targets)
    ]
    return sorted(answers, key=lambda answer: answer.rank)


class _Contexts:
    """Ways to trust an encrypted endpoint, the strictest first."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._made: list[ssl.SSLContext] | None = None
        self._lock = threading.Lock()

    def all(self) -> list[ssl.SSLContext]:
        """The run's own certificate and no other; then what the machine trusts, by the host's name."""
        with self._lock:
            if self._made is None:
                self._made = []
                if self._access.certificate is not None:
                    with contextlib.suppress(OSError, ValueError):
                        pinned = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
                        # Whoever has its key is the run; under which name it is reached doesn't matter then.
                        pinned.check_hostname = False
                        pinned.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
                        pinned.load_verify_locations(cadata=_first_certificate(self._access.certificate))
                        self._made.append(self._with_own(pinned))
                self._made.append(self._with_own(ssl.create_default_context()))
            return self._made

    def _with_own(self, context: ssl.SSLContext) -> ssl.SSLContext:
        if self._access.certificate is not None and self._access.key is not None:
            # Without a passphrase, as the run needs it; OpenSSL would ask on the terminal.
            with contextlib.suppress(OSError, ValueError):
                context.load_cert_chain(self._access.certificate, self._access.key, password="")
        return context


def _first_certificate(file: str) -> str:
    """The endpoint's own one: what follows are authorities, who may have signed others too.

    Raises:
        OSError: the file can't be read.
        ValueError: it holds none.
    """
    with open_file(file) as opened:
        found = _CERTIFICATE.search(opened.read(_PEM_BYTES))
    if found is None:
        raise ValueError("no certificate")
    return found[0].decode("ascii")


def _ask(target: Mapping[str, Any], access: Access, contexts: _Contexts, deadline: float) -> Answer:
    rank, address = _rank(target), _address(target)
    try:
        status, body = _fetch(target, access, contexts, deadline)
    except (OSError, ValueError, http.client.HTTPException) as error:
        return Answer(rank, address, None, _reason(error))
    if status == 401:
        return Answer(rank, address, None, access.problem or "it asks for another password")
    if status != 200:
        return Answer(rank, address, None, f"it answers {status}")
    values = parse_values(body.decode("utf-8", errors="replace"))
    if ("world_size", "") not in values:
        return Answer(rank, address, None, "what answers there is no rank of a training")
    return Answer(rank, address, values)


def _fetch(target: Mapping[str, Any], access: Access, contexts: _Contexts, deadline: float) -> tuple[int, bytes]:
    host, _, port = target["targets"][0].rpartition(":")
    host, at = host.strip("[]"), int(port)
    if not host or not 0 < at < 65536:
        raise ValueError(f"expected host:port, got {target['targets'][0]!r}")
    # What is to be encrypted is, whatever the file of targets says.
    if access.certificate is None and target["labels"].get("__scheme__") != "https":
        return _get(http.client.HTTPConnection(host, at, timeout=CONNECT_SECONDS), access, deadline)
    refused: ssl.SSLCertVerificationError | None = None
    for context in contexts.all():
        try:
            connection = http.client.HTTPSConnection(host, at, timeout=CONNECT_SECONDS, context=context)
            return _get(connection, access, deadline)
        except ssl.SSLCertVerificationError as error:
            refused = error
    assert refused is not None
    raise refused


def _get(connection: http.client.HTTPConnection, access: Access, deadline: float) -> tuple[int, bytes]:
    headers = {"Accept": "text/plain; version=0.0.4"}
    if access.user is not None and access.password is not None:
        token = base64.b64encode(f"{access.user}:{access.password}".encode()).decode()
        headers["Authorization"] = f"Basic {token}"
    with contextlib.closing(connection):
        connection.request("GET", "/metrics", headers=headers)
        response = connection.getresponse()
        body = b""
        while block := response.read1(1 << 16):
            body += block
            if len(body) > _MOST_BYTES:
                raise ValueError("it answers more than metrics")
            if time.monotonic() > deadline:
                raise TimeoutError("it answers too slowly")
        return response.status, body


def parse_values(text: str) -> Values:
    """The values of the metrics in Prometheus' text format; those of the buckets of histograms are left out.

    Metrics of this project lose their prefix; those with more than one label have none here. Text that isn't in the
    format has no values.
    """
    lines = [line for line in text.split("\n") if "_bucket{" not in line]
    values: Values = {}
    try:
        for family in text_string_to_metric_families("\n".join(lines)):
            for sample in family.samples:
                name, labels = sample.name.removeprefix(_PREFIX), list(sample.labels.values())
                if len(labels) < 2:
                    values[name, labels[0] if labels else ""] = sample.value
    except Exception:  # The library's parser promises nothing about text of another kind.
        return {}
    return values


def _rank(target: Mapping[str, Any]) -> int:
    text = target["labels"]["rank"]
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else -1


def _address(target: Mapping[str, Any]) -> str:
    return plain(target["targets"][0], 80)


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate isn't trusted ({error.verify_message})"
    if isinstance(error, ssl.SSLError):
        return f"no encrypted connection ({plain(error.reason or error)})"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return plain(error) or type(error).__name__
