"""The secrets of the metrics endpoint: certificate, key, password. Files, which are read and never shown.

A file that can't be used is an error of one line at the start. Certificates last for days or months, and a run may last
longer: they are read again when their files change.
"""

from __future__ import annotations

import contextlib
import logging
import os
import ssl
import stat
import threading
from pathlib import Path
from typing import NamedTuple, NoReturn

from partial_fc.errors import ConfigError

_log = logging.getLogger(__name__)


class Tls(NamedTuple):
    """PEM files of an encrypted endpoint. They are read again when they change.

    Attributes:
        certificate: the certificate, and those between it and the root.
        key: its private key, without a passphrase.
        client_ca: certificates that the client's must come from; None: clients need none.
    """

    certificate: str
    key: str
    client_ca: str | None = None


def first_line(content: bytes) -> str:
    """The password of a file: its first line without blanks around it, which Prometheus trims in its own file, too.

    Raises:
        UnicodeDecodeError: it's no text.
    """
    return content.decode().partition("\n")[0].strip()


def read_password(file: str) -> str:
    """The password of a file (:func:`first_line`); a warning where every user of the machine can read it.

    Raises:
        ConfigError: the file can't be read, or its first line is empty.
    """
    try:
        line = first_line(_read(file, "password_file"))
    except UnicodeDecodeError:
        raise ConfigError(f"metrics.password_file is {file!r}: got bytes that are no text, expected UTF-8") from None
    if not line:
        raise ConfigError(f"metrics.password_file is {file!r}: got an empty first line, expected the password there")
    _warn_of_readers(file, "password_file")
    return line


class Certificates:
    """The TLS context of the files as they are now, for any thread.

    Files that can't be used any more leave what there was: a renewal writes them one by one.

    Raises:
        ConfigError: the files can't be used at the start.
    """

    def __init__(self, tls: Tls) -> None:
        self._tls = tls
        self._lock = threading.Lock()
        self._seen = self._fingerprint()
        self._context = _make_context(tls)
        self._warned = False
        _warn_of_readers(tls.key, "tls_key")

    def context(self) -> ssl.SSLContext:
        """For one connection."""
        with self._lock:
            now = self._fingerprint()
            if now != self._seen:
                try:
                    self._context = _make_context(self._tls)
                    self._seen, self._warned = now, False
                except ConfigError as error:
                    # Tried again at each connection until it's whole.
                    if not self._warned:
                        _log.warning("%s; the metrics are served with the certificate read before", error)
                    self._warned = True
            return self._context

    def _fingerprint(self) -> list[tuple[int, int, int] | None]:
        found: list[tuple[int, int, int] | None] = []
        for file in self._tls:
            try:
                state = os.stat(file) if file is not None else None
            except OSError:
                state = None
            found.append(None if state is None else (state.st_mtime_ns, state.st_size, state.st_ino))
        return found


def _make_context(tls: Tls) -> ssl.SSLContext:
    if b"BEGIN CERTIFICATE" not in _read(tls.certificate, "tls_certificate"):
        raise ConfigError(f"metrics.tls_certificate is {tls.certificate!r}: got no certificate, expected one (PEM)")
    if b"PRIVATE KEY" not in _read(tls.key, "tls_key"):
        raise ConfigError(f"metrics.tls_key is {tls.key!r}: got no private key, expected one (PEM)")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION

    def no_passphrase() -> NoReturn:
        # OpenSSL would ask for it on the terminal.
        raise ConfigError(f"metrics.tls_key is {tls.key!r}: got a key with a passphrase, expected one without")

    try:
        context.load_cert_chain(tls.certificate, tls.key, password=no_passphrase)
    except OSError as error:
        if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
            got = "got a certificate and a key that don't belong together, expected a pair"
        else:
            got = f"OpenSSL refuses them ({_reason(error)}), expected a PEM certificate and its key"
        raise ConfigError(
            f"metrics.tls_certificate is {tls.certificate!r} and metrics.tls_key {tls.key!r}: {got}"
        ) from None
    if tls.client_ca is not None:
        _read(tls.client_ca, "tls_client_ca")
        try:
            context.load_verify_locations(tls.client_ca)
        except OSError as error:
            raise ConfigError(
                f"metrics.tls_client_ca is {tls.client_ca!r}: OpenSSL refuses it ({_reason(error)}), expected PEM "
                "certificates of an authority"
            ) from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _reason(error: OSError) -> str:
    return getattr(error, "reason", None) or error.strerror or str(error)


def _read(file: str, key: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise ConfigError(f"metrics.{key} is {file!r}: {error.strerror}: check the path and its permissions") from None


def _warn_of_readers(file: str, key: str) -> None:
    with contextlib.suppress(OSError):
        mode = stat.S_IMODE(os.stat(file).st_mode)
        if mode & stat.S_IROTH:
            _log.warning(
                "metrics.%s is %s: every user of this machine can read it (mode %04o); better: chmod 600",
                key,
                file,
                mode,
            )
