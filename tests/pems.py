"""Certificates for tests, made by the ``openssl`` program: each is its own authority."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path
from typing import NamedTuple

from tests.needs import need_programs


class Pair(NamedTuple):
    """PEM files.

    Attributes:
        certificate: for 127.0.0.1, ::1 and localhost, or for a client.
        key: its private key.
    """

    certificate: Path
    key: Path


def make_pair(folder: Path, name: str, passphrase: str | None = None) -> Pair:
    """Make a certificate and its key; skips the test where there is no ``openssl``."""
    need_programs("openssl", "openssl")
    pair = Pair(folder / f"{name}.pem", folder / f"{name}.key")
    locked = ["-nodes"] if passphrase is None else ["-passout", f"pass:{passphrase}"]
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", *locked]
    command += ["-days", "2", "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1,IP:::1,DNS:localhost"]
    command += ["-keyout", str(pair.key), "-out", str(pair.certificate)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    pair.key.chmod(0o600)
    return pair


def trusting(pair: Pair, own: Pair | None = None) -> ssl.SSLContext:
    """A client's settings: whom it trusts, and its own certificate."""
    context = ssl.create_default_context(cafile=str(pair.certificate))
    if own is not None:
        context.load_cert_chain(own.certificate, own.key)
    return context
