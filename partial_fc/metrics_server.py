"""The HTTP(S) endpoint of a rank's metrics, made for a process that has something better to do.

Whatever a client does, the training doesn't notice: a connection has a thread of its own (the TLS handshake happens
there, too), their number is bounded, each has a deadline, and nothing is printed about clients that vanish. One request
a connection: between two scrapes only a sleeping thread is left, and a renewed certificate counts from the next on.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import errno
import hashlib
import hmac
import logging
import os
import selectors
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler
from typing import Any, cast

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import choose_encoder

from partial_fc.certificates import Certificates, Tls, read_password

__all__ = ["MetricsServer", "Tls", "read_password"]

# Connections that are served at once; others wait in the kernel's queue.
_MOST = 8
# How long a connection may take to say what it wants; and that while others wait for its place.
_HEARING_SECONDS = 10.0
_CROWDED_SECONDS = 1.0
# How long a connection may last in all.
_SECONDS = 30.0
# How long a client has to close a connection that was answered.
_PARTING_SECONDS = 1.0
_TICK_SECONDS = 1.0

_log = logging.getLogger(__name__)


class MetricsServer:
    """Serves ``/metrics`` (also ``/``) and ``/healthz`` from daemon threads.

    ``/metrics`` is Prometheus' text or OpenMetrics, compressed where the client asks for it. ``/healthz`` is 200, or
    503 with a line that says why; it asks for no password and shows no figures. A client certificate it does ask for.

    Args:
        registry: what is served.
        port: where; 0: any free port.
        address: an address or name of this machine; ``0.0.0.0`` for all of IPv4, ``::`` for all of both.
        tls: encrypt, TLS 1.2 or above; None: don't.
        credentials: user and password (HTTP basic authentication); None: whoever reaches the port can read.
        healthy: what is wrong, in a line; None: nothing. Called in a thread at each request for ``/healthz``.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        port: int,
        address: str = "127.0.0.1",
        tls: Tls | None = None,
        credentials: tuple[str, str] | None = None,
        healthy: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.exposition: Callable[..., Any] = make_wsgi_app(registry)
        self.healthy = healthy
        self._address, self._port, self._tls = address, port, tls
        self._secret = None if credentials is None else _digest(":".join(credentials).encode())
        self._certificates: Certificates | None = None
        self._listener: socket.socket | None = None
        self._wake: socket.socket | None = None
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        self._changed = threading.Condition()  # guards the connections
        self._connections: set[_Connection] = set()
        self._warned: set[str] = set()

    @property
    def port(self) -> int:
        """The port; once started, the one that was chosen."""
        return self._port

    @property
    def url(self) -> str:
        """Where the metrics are."""
        host = f"[{self._address}]" if ":" in self._address else self._address
        return f"{'http' if self._tls is None else 'https'}://{host}:{self._port}/metrics"

    def start(self) -> None:
        """Open the port and serve.

        Raises:
            ConfigError: a certificate or key can't be used.
            OSError: the port can't be opened: it's taken, or the address isn't one of this machine.
        """
        self._certificates = None if self._tls is None else Certificates(self._tls)
        listener = _listen(self._address, self._port)
        woken, self._wake = socket.socketpair()
        self._closing.clear()
        self._thread = threading.Thread(target=self._accept_all, args=(listener, woken), name="metrics", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:  # no more threads, by a limit of the machine or container
            for opened in (listener, woken, self._wake):
                opened.close()
            self._thread = None
            raise OSError(errno.EAGAIN, str(error)) from error
        self._listener, self._port = listener, listener.getsockname()[1]

    def close(self) -> None:
        """Free the port, and end what is open. Closing twice is allowed."""
        if self._thread is None or self._wake is None or self._listener is None:
            return
        with self._changed:
            self._closing.set()
            self._changed.notify_all()
        # The thread may have seen it by itself, when a client came, and have closed its end.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._wake.send(b"\0")
        self._thread.join()
        self._listener.close()
        self._wake.close()
        self._thread = None
        deadline = time.monotonic() + _PARTING_SECONDS
        with self._changed:
            for connection in self._connections:
                connection.drop()
            while self._connections and self._changed.wait(max(0.0, deadline - time.monotonic())):
                pass

    def admits(self, authorization: str) -> bool:
        """Whether a request with this ``Authorization`` header may see the metrics; in constant time."""
        if self._secret is None:
            return True
        scheme, _, token = authorization.partition(" ")
        try:
            given = base64.b64decode(token.strip())
        except (binascii.Error, ValueError):
            given = b""
        return hmac.compare_digest(_digest(given), self._secret) and scheme.lower() == "basic"

    def warn_once(self, what: str, error: BaseException, consequence: str) -> None:
        """Say the first failure of its kind."""
        with self._changed:
            first = what not in self._warned
            self._warned.add(what)
        if first:
            text = f"{type(error).__name__}: {error}"
            _log.warning("the metrics endpoint at %s: %s (%s); %s", self.url, what, text, consequence)

    def _accept_all(self, listener: socket.socket, woken: socket.socket) -> None:
        with woken, selectors.DefaultSelector() as selector:
            selector.register(listener, selectors.EVENT_READ, True)
            selector.register(woken, selectors.EVENT_READ, False)
            while not self._closing.is_set():
                # Nobody is there: the thread sleeps until somebody comes.
                ready = selector.select(_TICK_SECONDS if self._connections else None)
                with self._changed:
                    self._drop_late(_HEARING_SECONDS)
                if any(key.data for key, _ in ready) and self._await_room():
                    self._accept(listener)

    def _await_room(self) -> bool:
        """Wait until there is a place for one more connection; False: the server closes.

        Whoever doesn't say what he wants gives his place to those who wait, so that silent clients can't lock
        Prometheus out.
        """
        with self._changed:
            while len(self._connections) >= _MOST and not self._closing.is_set():
                self._drop_late(_CROWDED_SECONDS)
                self._changed.wait(_TICK_SECONDS / 10)
            return not self._closing.is_set()

    def _drop_late(self, patience: float) -> None:
        now = time.monotonic()
        for connection in self._connections:
            if now - connection.began > (_SECONDS if connection.heard else patience):
                connection.drop()

    def _accept(self, listener: socket.socket) -> None:
        try:
            accepted, _ = listener.accept()
        except (BlockingIOError, ConnectionError):
            return  # gone before its turn
        except OSError as error:
            self.warn_once("a connection can't be accepted", error, "trying on; look at the limit of open files")
            # It's still there: without a pause this would be a loop.
            self._closing.wait(_TICK_SECONDS)
            return
        accepted.settimeout(_SECONDS)
        connection = _Connection(accepted)
        with self._changed:
            self._connections.add(connection)
        try:
            threading.Thread(target=self._serve, args=(connection,), name="metrics-scrape", daemon=True).start()
        except RuntimeError as error:
            self._forget(connection)
            self.warn_once("no thread for a connection", error, "trying on; look at the limit of processes")

    def _serve(self, connection: _Connection) -> None:
        try:
            if self._certificates is not None:
                connection.encrypt(self._certificates.context())
            _Answer(connection, self)
            connection.end()
        except OSError:
            pass  # a client that vanished, is late, or speaks no TLS: nothing that the run's log should have
        except Exception as error:
            self.warn_once("a request failed", error, "the training goes on")
        finally:
            self._forget(connection)

    def _forget(self, connection: _Connection) -> None:
        # Under the lock: nobody drops it any more when its descriptor may be another's.
        with self._changed:
            self._connections.discard(connection)
            self._changed.notify_all()
        with contextlib.suppress(OSError):
            connection.socket.close()


class _Connection:
    """A client's connection.

    Attributes:
        socket: of it; an encrypted one replaces the plain one.
        began: when it was accepted (``time.monotonic``).
        heard: whether its request was read.
    """

    def __init__(self, accepted: socket.socket) -> None:
        self.socket = accepted
        self.began = time.monotonic()
        self.heard = False

    def encrypt(self, context: ssl.SSLContext) -> None:
        # The handshake is a step of its own: before, the socket must be where `drop` finds it.
        encrypted = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self.socket = encrypted
        encrypted.do_handshake()

    def drop(self) -> None:
        """Wake the thread that waits for this client, in whatever call it does."""
        with contextlib.suppress(OSError):
            # Not SSLSocket's own, which takes away what that call is using.
            socket.socket.shutdown(self.socket, socket.SHUT_RDWR)

    def end(self) -> None:
        """Let the client close first: with input unread, closing here would take the answer back."""
        self.socket.settimeout(_PARTING_SECONDS)
        if isinstance(self.socket, ssl.SSLSocket):
            self.socket.unwrap()
            return
        self.socket.shutdown(socket.SHUT_WR)
        while self.socket.recv(1 << 16):  # for so long as the deadline allows
            pass


class _Answer(BaseHTTPRequestHandler):
    """Reads a connection's request and answers it, all in its constructor."""

    protocol_version = "HTTP/1.1"
    # Else what isn't understood is answered without a status.
    default_request_version = "HTTP/1.0"
    disable_nagle_algorithm = True

    def __init__(self, connection: _Connection, server: MetricsServer) -> None:
        self._connection, self._metrics_server = connection, server
        super().__init__(cast(Any, connection.socket), ("", 0), cast(Any, None))

    def handle(self) -> None:
        self.handle_one_request()

    def parse_request(self) -> bool:
        understood = super().parse_request()
        self._connection.heard = True
        return understood

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        if path == "/healthz":
            self._health()
        elif not self._metrics_server.admits(self.headers.get("Authorization", "")):
            self._say(401, "a user and a password are needed", ("WWW-Authenticate", 'Basic realm="partial_fc"'))
        elif path in ("/", "/metrics"):
            self._metrics(query)
        else:
            self._say(404, "nothing is here: the metrics are at /metrics")

    do_HEAD = do_GET

    def _health(self) -> None:
        try:
            trouble = self._metrics_server.healthy()
        except Exception as error:  # whatever the trainer gave
            self._metrics_server.warn_once("its health can't be told", error, "/healthz answers 500")
            self._say(500, "its health can't be told: see the log of this rank")
            return
        self._say(200 if trouble is None else 503, trouble or "ok")

    def _metrics(self, query: str) -> None:
        request = {"REQUEST_METHOD": "GET", "PATH_INFO": "/metrics", "QUERY_STRING": query}
        for name in ("Accept", "Accept-Encoding"):
            if name in self.headers:
                request[f"HTTP_{name.upper().replace('-', '_')}"] = self.headers[name]
        made: list[Any] = []
        try:
            choose_encoder(request.get("HTTP_ACCEPT", ""))
        except (TypeError, ValueError):  # a version that the library can't compare: plain text, as for none
            request.pop("HTTP_ACCEPT", None)
        try:
            body = b"".join(self._metrics_server.exposition(request, lambda *answer: made.extend(answer)))
        except Exception as error:  # whatever a collector may raise
            self._metrics_server.warn_once("a scrape failed", error, "it answers 500, and the training goes on")
            self._say(500, "the metrics can't be collected: see the log of this rank")
            return
        self._reply(int(made[0].split()[0]), body, made[1])

    def _say(self, code: int, line: str, *headers: tuple[str, str]) -> None:
        self._reply(code, f"{line}\n".encode(), [("Content-Type", "text/plain; charset=utf-8"), *headers])

    def _reply(self, code: int, body: bytes, headers: Sequence[tuple[str, str]]) -> None:
        self.send_response(code)
        for name, value in (*headers, ("Content-Length", str(len(body))), ("Connection", "close")):
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        self._say(code, message or "no request that is understood here")

    def version_string(self) -> str:
        return "partial_fc"

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _digest(text: bytes) -> bytes:
    # Of one length, so that comparing tells nothing of the secret's.
    return hashlib.sha256(text).digest()


def _listen(address: str, port: int) -> socket.socket:
    """A listening socket of the first address that a name stands for and that can be had.

    Raises:
        OSError: there is none.
    """
    failure: OSError | None = None
    try:
        places = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except UnicodeError as error:  # no name of a machine
        raise OSError(errno.EINVAL, str(error)) from None
    for family, kind, protocol, _, place in places:
        try:
            listener = socket.socket(family, kind, protocol)
        except OSError as error:
            failure = failure or error
            continue
        try:
            # The process before this one may have had connections: they don't hold the port.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            listener.bind(place)
            listener.listen(64)
            listener.setblocking(False)
            return listener
        except OSError as error:
            listener.close()
            failure = failure or error
    raise failure or OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
