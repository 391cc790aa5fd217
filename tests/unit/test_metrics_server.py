from __future__ import annotations

import base64
import errno
import gzip
import http.client
import logging
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from partial_fc import metrics_server
from partial_fc.metrics_server import MetricsServer, Tls
from tests.pems import Pair, make_pair, trusting

# What a client here waits at most: far above what anything should take, also on a busy machine.
PATIENCE = 60


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


def a_registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    Counter("partial_fc_samples_total", "Samples.", registry=registry).inc(7)
    Gauge("partial_fc_loss", "Loss.", registry=registry).set(2.5)
    return registry


@contextmanager
def serving(registry: CollectorRegistry | None = None, **arguments: Any) -> Iterator[MetricsServer]:
    server = MetricsServer(registry or a_registry(), **{"port": 0, **arguments})
    server.start()
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(autouse=True)
def no_thread_dies_or_stays(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Nothing but the log may say anything, and no thread outlives its server."""
    yield
    until(lambda: not threads(), "the server's threads end")
    assert capfd.readouterr() == ("", "")


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("metrics")]


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"it didn't come about that {what}"
        time.sleep(0.01)


def get(
    server: MetricsServer,
    path: str = "/metrics",
    *,
    method: str = "GET",
    tls: ssl.SSLContext | None = None,
    host: str = "127.0.0.1",
    **headers: str,
) -> Answer:
    connection: http.client.HTTPConnection
    if tls is None:
        connection = http.client.HTTPConnection(host, server.port, timeout=PATIENCE)
    else:
        connection = http.client.HTTPSConnection(host, server.port, timeout=PATIENCE, context=tls)
    try:
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return Answer(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())
    finally:
        connection.close()


def client(server: MetricsServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE)


def rest_of(connection: socket.socket) -> bytes:
    """All that comes until the server closes."""
    received = b""
    try:
        while part := connection.recv(1 << 16):
            received += part
    except ConnectionResetError:
        pass
    return received


def values(text: bytes, parse: Any = parse_text) -> dict[str, float]:
    return {sample.name: sample.value for family in parse(text.decode()) for sample in family.samples}


@pytest.mark.parametrize("path", ["/metrics", "/", "/metrics?", "/?x=1"])
def test_the_exposition_is_text_that_parses(path: str) -> None:
    with serving() as server:
        answer = get(server, path)
    assert answer.status == 200 and answer.headers["content-type"].startswith("text/plain; version=")
    assert answer.headers["content-length"] == str(len(answer.body)) and answer.headers["connection"] == "close"
    assert "python" not in answer.headers["server"].lower(), "the server's version is nobody's business"
    found = values(answer.body)
    assert found["partial_fc_samples_total"] == 7 and found["partial_fc_loss"] == 2.5


def test_format_compression_and_selection_are_the_clients_choice() -> None:
    accept = "application/openmetrics-text; version=1.0.0"
    with serving() as server:
        assert server.url == f"http://127.0.0.1:{server.port}/metrics"
        answer = get(server, Accept=accept, Accept_Encoding="gzip, deflate")
        only = get(server, "/metrics?name[]=partial_fc_loss")
    assert answer.headers["content-type"].startswith(accept) and answer.headers["content-encoding"] == "gzip"
    assert values(gzip.decompress(answer.body), parse_openmetrics)["partial_fc_samples_total"] == 7
    assert values(only.body) == {"partial_fc_loss": 2.5}


def test_a_format_that_makes_no_sense_is_none(caplog: pytest.LogCaptureFixture) -> None:
    with serving() as server:
        answer = get(server, Accept="application/openmetrics-text;version=banana")
    assert answer.status == 200 and answer.headers["content-type"].startswith("text/plain; version=")
    assert values(answer.body)["partial_fc_loss"] == 2.5 and not caplog.records


def test_head_is_get_without_the_body() -> None:
    with serving() as server, client(server) as connection:
        connection.sendall(b"HEAD /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        head, _, body = rest_of(connection).partition(b"\r\n\r\n")
        whole = get(server)
    assert head.startswith(b"HTTP/1.1 200") and body == b""
    assert f"Content-Length: {whole.headers['content-length']}".encode() in head


def test_other_paths_and_methods() -> None:
    with serving() as server:
        assert get(server, "/metricsx").status == get(server, "/../etc/passwd").status == 404
        refused = get(server, method="POST")
        assert refused.status == 501 and refused.body == b"Unsupported method ('POST')\n"


def test_health_says_what_is_wrong_and_asks_for_no_password() -> None:
    trouble: list[str | None] = [None]
    with serving(healthy=lambda: trouble[0], credentials=("ops", "secret")) as server:
        assert get(server, "/healthz")[::2] == (200, b"ok\n")
        trouble[0] = "no progress since step 12"
        assert get(server, "/healthz")[::2] == (503, b"no progress since step 12\n")
        assert get(server, "/healthz", method="HEAD")[::2] == (503, b"")
        assert get(server, "/").status == 401


def test_health_that_fails_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> str | None:
        raise RuntimeError("no clock")

    with serving(healthy=broken) as server:
        assert [get(server, "/healthz").status for _ in range(3)] == [500, 500, 500]
    assert len(caplog.records) == 1 and "RuntimeError: no clock" in caplog.text


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /" + b"x" * 200_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nA: " + b"x" * 200_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 1000 + b"\r\n",
        b"GET / HTTP/7.7\r\n\r\n",
        b"GET / HTTP/one\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"\xff\x00" * 1000 + b"\r\n\r\n",
        b"\r\n\r\n",
        b"GET /\r\n",
        b"GET //[ HTTP/1.1\r\n\r\n",
        b"GET /metrics?%ff[]=%zz&name[]=%00 HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nAccept: application/openmetrics-text; version=a.b;q=\xff\r\n\r\n",
        b"GET / HTTP/1.1\r\nAuthorization: Basic \xff\xff\r\nAccept-Encoding: \xe9\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 9999999\r\n\r\n" + b"x" * 300_000,
        b"",
    ],
    ids=lambda request: repr(request[:40]),
)
def test_a_request_that_makes_no_sense_harms_nobody(request_bytes: bytes) -> None:
    with serving(credentials=("ops", "secret")) as server:
        with client(server) as connection:
            try:
                connection.sendall(request_bytes)
                connection.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # it was refused while it was sent
            rest_of(connection)
        assert get(server, Authorization=basic("ops:secret")).status == 200


@pytest.mark.parametrize(
    ("request_bytes", "code"),
    [
        # More than sockets hold: a server that just closes would break the sending.
        (b"GET /" + b"x" * 20_000_000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\nA: " + b"x" * 20_000_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 1000 + b"\r\n", 431),
        (b"hello\r\n\r\n", 400),
    ],
    ids=["line", "header", "headers", "no request"],
)
def test_what_is_too_long_is_told_though_input_is_unread(request_bytes: bytes, code: int) -> None:
    with serving() as server, client(server) as connection:
        connection.sendall(request_bytes)
        assert f" {code} ".encode() in rest_of(connection).partition(b"\r\n")[0]


def basic(text: str) -> str:
    return f"Basic {base64.b64encode(text.encode()).decode()}"


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (None, 401),
        ("", 401),
        ("Basic", 401),
        ("Basic !!!", 401),
        ("Basic \xff", 401),
        (basic("ops:wrong"), 401),
        (basic("ops:secret:word "), 401),
        (basic("root:s\u00e9cret:word"), 401),
        (basic("ops:s\u00e9cret:word").replace("Basic", "Bearer"), 401),
        (basic("ops:s\u00e9cret:word"), 200),
        (basic("ops:s\u00e9cret:word").replace("Basic", "bASIC"), 200),
    ],
)
def test_a_password_is_asked_for(header: str | None, status: int) -> None:
    with serving(credentials=("ops", "s\u00e9cret:word")) as server:
        answers = [get(server, path, **({} if header is None else {"Authorization": header})) for path in ("/", "/x")]
    assert answers[0].status == status and answers[1].status == (401 if status == 401 else 404)
    if status == 401:
        assert answers[0].headers["www-authenticate"] == 'Basic realm="partial_fc"'
        assert b"partial_fc_" not in answers[0].body


def test_fifty_scrapes_at_once() -> None:
    with serving() as server, ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda _: get(server), range(50)))
    assert {answer.status for answer in answers} == {200}


@pytest.mark.parametrize("first", [b"", b"GET /metrics HT", b"GET / HTTP/1.1\r\nHost: x\r\n"])
def test_clients_that_say_nothing_keep_nobody_out(first: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    # Patience is out of the way: only that others wait makes them go.
    monkeypatch.setattr(metrics_server, "_HEARING_SECONDS", 10 * PATIENCE)
    monkeypatch.setattr(metrics_server, "_SECONDS", 10 * PATIENCE)
    monkeypatch.setattr(metrics_server, "_CROWDED_SECONDS", 0.1)
    with serving() as server, ExitStack() as opened:
        for _ in range(3 * metrics_server._MOST):
            opened.enter_context(client(server)).sendall(first)
        assert get(server).status == 200
        assert len(threads()) <= metrics_server._MOST + 1


def test_a_request_that_drips_in_ends_at_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_server, "_HEARING_SECONDS", 0.5)
    monkeypatch.setattr(metrics_server, "_TICK_SECONDS", 0.1)
    with serving() as server, client(server) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nA: ")
        connection.settimeout(0.05)

        def is_closed() -> bool:
            try:
                connection.sendall(b"x")
                return connection.recv(1) == b""
            except TimeoutError:
                return False
            except OSError:
                return True

        until(is_closed, "a slow client is dropped")


def big_registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    gauge = Gauge("partial_fc_big", "Big.", ["which"], registry=registry)
    for which in range(20_000):  # more than sockets hold
        gauge.labels(f"{which:0200d}")
    return registry


def test_clients_that_vanish_or_never_read_are_no_news(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(metrics_server, "_SECONDS", 2.0)
    monkeypatch.setattr(metrics_server, "_TICK_SECONDS", 0.1)
    with serving(big_registry()) as server:
        with client(server) as deaf:
            until(lambda: len(threads()) == 2, "it is being served")
            for _ in range(3):
                with client(server) as connection:
                    connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
                    # Closed with a reset.
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            deaf.sendall(b"GET / HTTP/1.1\r\n\r\n")
            until(lambda: len(threads()) == 1, "only the thread that waits for clients is left")
        assert get(server, "/healthz").status == 200
    assert caplog.records == []


class Flaky:
    broken = True

    def collect(self) -> Iterator[Any]:
        if self.broken:
            raise RuntimeError("the driver is gone")
        return iter(())


def test_a_collector_that_fails_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    registry, flaky = a_registry(), Flaky()
    flaky.broken = False
    registry.register(flaky)  # type: ignore[arg-type]
    flaky.broken = True
    with serving(registry) as server, caplog.at_level(logging.WARNING):
        answers = [get(server) for _ in range(3)]
        assert [answer.status for answer in answers] == [500, 500, 500]
        assert answers[0].body == b"the metrics can't be collected: see the log of this rank\n"
        assert len(caplog.records) == 1 and caplog.records[0].exc_info is None
        assert f"{server.url}: a scrape failed (RuntimeError: the driver is gone); it answers 500" in caplog.text
        flaky.broken = False
        assert get(server).status == 200


def test_a_stuck_scrape_keeps_nobody_waiting() -> None:
    registry, go_on, entered = a_registry(), threading.Event(), threading.Semaphore(0)
    gauge = Gauge("partial_fc_stuck", "Stuck.", registry=registry)
    first = iter([True])

    def value() -> float:
        if next(first, False):
            entered.release()
            go_on.wait(PATIENCE)
        return 1.0

    gauge.set_function(value)
    with serving(registry) as server, ThreadPoolExecutor(1) as pool:
        stuck = pool.submit(get, server)
        assert entered.acquire(timeout=PATIENCE)
        assert get(server).status == 200 and not stuck.done()
        go_on.set()
        assert stuck.result(PATIENCE).status == 200


def test_a_port_in_use_and_a_foreign_address_are_the_callers() -> None:
    with serving() as server:
        with pytest.raises(OSError) as taken:
            MetricsServer(a_registry(), port=server.port).start()
        assert taken.value.errno == errno.EADDRINUSE
        with pytest.raises(OSError) as foreign:
            MetricsServer(a_registry(), port=0, address="192.0.2.1").start()
        assert foreign.value.errno == errno.EADDRNOTAVAIL
        with pytest.raises(OSError, match="."):
            MetricsServer(a_registry(), port=0, address="no.such.host.invalid").start()


def test_ipv6() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    with serving(address="::1") as server:
        assert server.url == f"http://[::1]:{server.port}/metrics"
        assert get(server, host="::1").status == 200
    with serving(address="::") as server:
        assert get(server, host="::1").status == get(server, host="127.0.0.1").status == 200


def test_closing_frees_the_port_whoever_is_connected() -> None:
    server = MetricsServer(a_registry(), port=0)
    server.close()
    server.start()
    assert threads() and all(thread.daemon for thread in threads())
    with client(server) as silent, client(server) as half:
        half.sendall(b"GET / HTTP/1.1\r\n")
        assert get(server).status == 200
        until(lambda: len(threads()) == 3, "both are being served")
        assert all(thread.daemon for thread in threads())
        server.close()
        server.close()
        assert rest_of(silent) == rest_of(half) == b""
        with pytest.raises(ConnectionRefusedError):
            client(server)
        with serving(port=server.port) as next_one:
            assert get(next_one).status == 200
    server.start()
    assert get(server).status == 200
    server.close()


def test_no_descriptors_or_threads_left_is_said_once_and_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tries = 4
    accepts, pauses = iter(range(tries)), []
    accept, start = socket.socket.accept, threading.Thread.start

    def failing_accept(this: socket.socket) -> Any:
        if next(accepts, None) is not None:
            raise OSError(errno.EMFILE, "Too many open files")
        return accept(this)

    starts = iter(range(tries))

    def failing_start(this: threading.Thread) -> None:
        if this.name == "metrics-scrape" and next(starts, None) is not None:
            raise RuntimeError("can't start new thread")
        start(this)

    monkeypatch.setattr(metrics_server, "_TICK_SECONDS", 0.01)
    with serving() as server:
        wait = server._closing.wait
        monkeypatch.setattr(server._closing, "wait", lambda seconds: pauses.append(seconds) or wait(seconds))
        monkeypatch.setattr(socket.socket, "accept", failing_accept)
        assert get(server).status == 200
        monkeypatch.setattr(threading.Thread, "start", failing_start)
        for _ in range(tries):
            with client(server) as connection:
                assert rest_of(connection) == b""
        assert get(server).status == 200
    assert len(pauses) == tries, "without a pause this would be a loop that takes a processor"
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "limit of open files" in caplog.text and "limit of processes" in caplog.text


def test_no_thread_at_the_start_is_an_os_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(this: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    server = MetricsServer(a_registry(), port=port)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", fail)
        with pytest.raises(OSError, match="can't start new thread"):
            server.start()
    with serving(port=port) as server:
        assert get(server).status == 200


def test_closing_does_not_mind_that_the_thread_has_ended_by_itself() -> None:
    with serving() as server:
        thread, wake, port = server._thread, server._wake, server.port
        assert thread is not None and wake is not None

        class Late:
            """A client wakes the thread first."""

            def send(self, data: bytes) -> int:
                with socket.create_connection(("127.0.0.1", port)):
                    thread.join(30)
                assert not thread.is_alive()
                return wake.send(data)

            def close(self) -> None:
                wake.close()

        server._wake = Late()  # type: ignore[assignment]
        server.close()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pair, Pair, Pair]:
    folder = tmp_path_factory.mktemp("pems")
    return make_pair(folder, "server"), make_pair(folder, "prometheus"), make_pair(folder, "stranger")


def test_tls_and_a_password(pairs: tuple[Pair, Pair, Pair]) -> None:
    pair, other, _ = pairs
    tls = Tls(str(pair.certificate), str(pair.key))
    with serving(tls=tls, credentials=("ops", "secret")) as server:
        assert server.url == f"https://127.0.0.1:{server.port}/metrics"
        answer = get(server, tls=trusting(pair), Authorization=basic("ops:secret"), Accept_Encoding="gzip")
        assert values(gzip.decompress(answer.body))["partial_fc_loss"] == 2.5
        assert get(server, tls=trusting(pair)).status == 401
        with pytest.raises(ssl.SSLCertVerificationError):
            get(server, tls=trusting(other))
        # Somebody who forgot the https.
        with pytest.raises((http.client.HTTPException, OSError)):
            get(server)
        assert get(server, "/healthz", tls=trusting(pair)).status == 200


def test_silent_tls_clients_keep_nobody_waiting(
    pairs: tuple[Pair, Pair, Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_server, "_HEARING_SECONDS", 10 * PATIENCE)
    monkeypatch.setattr(metrics_server, "_SECONDS", 10 * PATIENCE)
    pair, *_ = pairs
    with serving(tls=Tls(str(pair.certificate), str(pair.key))) as server, ExitStack() as opened:
        for first in (b"", b"\x16\x03\x01\x02\x00\x01"):
            opened.enter_context(client(server)).sendall(first)
        silent = trusting(pair).wrap_socket(client(server), server_hostname="127.0.0.1")
        opened.enter_context(silent)
        until(lambda: len(threads()) == 4, "all three are being served")
        # In parallel with one whose answer is on its way.
        assert [get(server, tls=trusting(pair)).status for _ in range(3)] == [200] * 3
        server.close()
        until(lambda: not threads(), "closing ends what is in the middle of a handshake")


def test_fifty_tls_scrapes_at_once(pairs: tuple[Pair, Pair, Pair]) -> None:
    pair, *_ = pairs
    context = trusting(pair)
    with serving(tls=Tls(str(pair.certificate), str(pair.key))) as server, ThreadPoolExecutor(50) as pool:
        assert {answer.status for answer in pool.map(lambda _: get(server, tls=context), range(50))} == {200}


def test_a_client_certificate_is_asked_for(pairs: tuple[Pair, Pair, Pair]) -> None:
    pair, prometheus, stranger = pairs
    with serving(tls=Tls(str(pair.certificate), str(pair.key), str(prometheus.certificate))) as server:
        assert get(server, tls=trusting(pair, own=prometheus)).status == 200
        for own in (None, stranger):
            with pytest.raises(OSError):  # an SSLError, or a reset
                get(server, tls=trusting(pair, own=own))
            with pytest.raises(OSError):
                get(server, "/healthz", tls=trusting(pair, own=own))


def test_a_renewed_certificate_needs_no_restart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = make_pair(tmp_path, "first"), make_pair(tmp_path, "second")
    used = Pair(tmp_path / "tls.crt", tmp_path / "tls.key")

    def put(source: Path, target: Path) -> None:
        other = target.with_suffix(".new")
        other.write_bytes(source.read_bytes())
        other.chmod(0o600)
        other.replace(target)

    put(first.certificate, used.certificate)
    put(first.key, used.key)
    with serving(tls=Tls(str(used.certificate), str(used.key))) as server:
        assert get(server, tls=trusting(first)).status == 200
        # Half a renewal: what there was goes on, and that is said once.
        put(second.certificate, used.certificate)
        assert [get(server, tls=trusting(first)).status for _ in range(3)] == [200] * 3
        assert len(caplog.records) == 1 and "don't belong together" in caplog.text
        assert "served with the certificate read before" in caplog.text
        put(second.key, used.key)
        assert get(server, tls=trusting(second)).status == 200
        with pytest.raises(ssl.SSLCertVerificationError):
            get(server, tls=trusting(first))
        used.key.unlink()
        assert get(server, tls=trusting(second)).status == 200
    assert len(caplog.records) == 2
