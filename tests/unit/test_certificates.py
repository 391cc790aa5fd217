from __future__ import annotations

import logging
import os
import ssl
from pathlib import Path

import pytest

from partial_fc.certificates import Certificates, Tls, read_password
from partial_fc.errors import ConfigError
from tests.pems import Pair, make_pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pems"), "server")


def write(path: Path, content: bytes, mode: int = 0o600) -> str:
    path.write_bytes(content)
    path.chmod(mode)
    return str(path)


def test_the_first_line_is_the_password(tmp_path: Path) -> None:
    assert read_password(write(tmp_path / "a", " s\u00e9cret word \n# a comment\n".encode())) == "s\u00e9cret word"
    assert read_password(write(tmp_path / "b", b"secret\r\n")) == "secret"
    assert read_password(write(tmp_path / "c", b"secret")) == "secret"


@pytest.mark.parametrize("content", [b"", b"\nsecret\n", b"  \n"])
def test_an_empty_password_is_an_error(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(
        ConfigError, match=r"metrics.password_file is '.*/a': got an empty first line, expected the pass"
    ):
        read_password(write(tmp_path / "a", content))


def test_a_password_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"password_file is '.*/none': No such file or directory: check the path"):
        read_password(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"Is a directory"):
        read_password(str(tmp_path))
    with pytest.raises(ConfigError, match=r"got bytes that are no text"):
        read_password(write(tmp_path / "a", b"\xff\xfe"))


@pytest.mark.parametrize(("mode", "warns"), [(0o600, False), (0o640, False), (0o644, True), (0o604, True)])
def test_secrets_that_everybody_can_read_are_warned_of(
    tmp_path: Path, pair: Pair, mode: int, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    password = write(tmp_path / "password", b"secret\n", mode)
    key = write(tmp_path / "key", pair.key.read_bytes(), mode)
    with caplog.at_level(logging.WARNING):
        read_password(password)
        certificates = Certificates(Tls(str(pair.certificate), key))
        certificates.context()
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == (2 if warns else 0)
    if warns:
        assert lines[0] == (
            f"metrics.password_file is {password}: every user of this machine can read it (mode {mode:04o}); "
            "better: chmod 600"
        )
        assert "secret\n" not in caplog.text


def test_old_protocols_are_off(pair: Pair) -> None:
    context = Certificates(Tls(str(pair.certificate), str(pair.key))).context()
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2 and context.options & ssl.OP_NO_RENEGOTIATION
    assert context.verify_mode == ssl.CERT_NONE


def test_the_context_is_made_again_only_for_other_files(tmp_path: Path, pair: Pair) -> None:
    tls = Tls(write(tmp_path / "c", pair.certificate.read_bytes()), write(tmp_path / "k", pair.key.read_bytes()))
    certificates = Certificates(tls)
    first = certificates.context()
    assert certificates.context() is first
    os.utime(tls.certificate, ns=(1, 1))
    second = certificates.context()
    assert second is not first and certificates.context() is second


def test_an_authority_that_changes_counts_at_once(tmp_path: Path, pair: Pair) -> None:
    authority = tmp_path / "ca"
    tls = Tls(str(pair.certificate), str(pair.key), write(authority, pair.certificate.read_bytes()))
    certificates = Certificates(tls)
    assert certificates.context().verify_mode == ssl.CERT_REQUIRED
    assert [found["subject"] for found in certificates.context().get_ca_certs()] == [((("commonName", "server"),),)]
    other = make_pair(tmp_path, "other")
    write(authority, other.certificate.read_bytes())
    assert [found["subject"] for found in certificates.context().get_ca_certs()] == [((("commonName", "other"),),)]


def test_files_that_cannot_be_used_are_one_line(tmp_path: Path, pair: Pair) -> None:
    certificate, key = str(pair.certificate), str(pair.key)
    other, locked = make_pair(tmp_path, "other"), make_pair(tmp_path, "locked", passphrase="a passphrase")
    torn = write(tmp_path / "torn", pair.certificate.read_bytes()[:200])
    cases = [
        (Tls("/none.pem", key), r"tls_certificate is '/none.pem': No such file or directory: check the path"),
        (Tls(certificate, "/none.key"), r"tls_key is '/none.key': No such file or directory"),
        (Tls(certificate, key, "/none.ca"), r"tls_client_ca is '/none.ca': No such file or directory"),
        (Tls(str(tmp_path), key), r"tls_certificate is .*: Is a directory"),
        (Tls(key, key), r"tls_certificate is '.*server.key': got no certificate, expected one \(PEM\)"),
        (Tls(certificate, certificate), r"tls_key is '.*server.pem': got no private key, expected one \(PEM\)"),
        (
            Tls(certificate, str(other.key)),
            r"tls_certificate is .* and metrics.tls_key '.*other.key': got a certificate",
        ),
        (Tls(str(locked.certificate), str(locked.key)), r"tls_key is '.*locked.key': got a key with a passphrase"),
        (
            Tls(torn, key),
            r"tls_certificate is '.*torn' and metrics.tls_key '.*': OpenSSL refuses them \(.+\), expected",
        ),
        (Tls(certificate, key, key), r"tls_client_ca is '.*server.key': OpenSSL refuses it \(.+\), expected PEM"),
    ]
    for tls, match in cases:
        with pytest.raises(ConfigError, match=f"^metrics.{match}") as raised:
            Certificates(tls)
        assert "\n" not in str(raised.value)
