"""Ranks that are asked: those that answer, those that don't, and those that are something else."""

from __future__ import annotations

import base64
import contextlib
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from partial_fc.certificates import read_password
from partial_fc.metrics import TrainingMetrics
from partial_fc.metrics_server import Tls
from partial_fc.status import scrape as module
from partial_fc.status.scrape import Access, Answer, parse_values, read_access, scrape
from partial_fc.targets import targets_file, targets_of, write_targets
from tests.made_runs import make_run, read
from tests.needs import lacks
from tests.pems import Pair, make_pair


@contextlib.contextmanager
def rank(number: int = 0, **options: Any) -> Iterator[int]:
    """A rank that serves; its port."""
    with TrainingMetrics(number, 2) as metrics:
        metrics.observe_phase("data", 0.25)
        metrics.observe_phase("data", 0.75)
        metrics.record_step(12, 7)
        metrics.record_decode_errors({"image": 3})
        metrics.start(0, **options)
        assert metrics.port is not None
        yield metrics.port


@contextlib.contextmanager
def talker(answer: bytes, pause: float = 0.0, times: int = 1) -> Iterator[int]:
    """Something else that listens: says its piece to each who comes, and again; its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    client, _ = listener.accept()
                except OSError:
                    return
                with client, contextlib.suppress(OSError):
                    # With input unread, closing would take the answer back.
                    client.recv(1 << 16)
                    for _ in range(times):
                        client.sendall(answer)
                        time.sleep(pause)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)


def at(*ports: int, tls: bool = False) -> list[dict[str, Any]]:
    return targets_of([("127.0.0.1", port) for port in ports], run="r", tls=tls)


def ask(port: int, access: Access = Access(), *, tls: bool = False) -> Answer:  # noqa: B008
    (answer,) = scrape(at(port, tls=tls), access)
    return answer


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_every_rank_is_asked_and_its_values_come_by_name_and_label() -> None:
    with rank(0) as first, rank(1) as second:
        answers = scrape(at(first, second)[::-1], Access())
    assert [answer.rank for answer in answers] == [0, 1]
    assert answers[1].address == f"127.0.0.1:{second}" and answers[1].problem is None
    answer = answers[1]
    assert answer.get("rank") == 1 and answer.get("reached_step") == 7
    assert answer.get("loss") is None, "not measured yet"
    assert answer.by_label("step_seconds_sum")["data"] == 1.0 and answer.get("step_seconds_count", "data") == 2
    assert answer.by_label("decode_errors_total")["image"] == 3
    assert (answer.get("process_resident_memory_bytes") or 0) > 1e6
    assert not [name for name, _ in answer.values or {} if name.endswith("_bucket")]


def test_one_that_is_gone_costs_the_others_nothing() -> None:
    with rank(1) as port:
        down, up = scrape(at(free_port(), port), Access())
    assert down == Answer(0, down.address, None, "connection refused") and up.get("rank") == 1


def test_passwords(tmp_path: Path) -> None:
    with rank(credentials=("me", "s\u00e9cret")) as port:
        assert ask(port, Access(user="me", password="s\u00e9cret")).values is not None
        assert ask(port, Access(user="me", password="other")).problem == "it asks for another password"
        assert ask(port, Access(user="me", problem="no file")).problem == "no file"


def test_the_runs_own_certificate_is_trusted_and_no_other(tmp_path: Path) -> None:
    pair, other = make_pair(tmp_path, "rank"), make_pair(tmp_path, "other")
    with rank(tls=Tls(str(pair.certificate), str(pair.key))) as port:
        assert ask(port, Access(str(pair.certificate)), tls=True).values is not None
        for access in (Access(str(other.certificate)), Access(str(tmp_path / "none")), Access()):
            assert (ask(port, access, tls=True).problem or "").startswith("its certificate isn't trusted")
        assert ask(port).problem is not None, "what speaks TLS isn't asked in the clear"
    with rank() as port:
        assert "encrypted" in (ask(port, Access(str(pair.certificate)), tls=True).problem or "")


def test_a_certificate_of_the_machines_own_authorities_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = make_pair(tmp_path, "rank")
    monkeypatch.setenv("SSL_CERT_FILE", str(pair.certificate))
    with rank(tls=Tls(str(pair.certificate), str(pair.key))) as port:
        assert ask(port, tls=True).values is not None


def test_where_a_client_certificate_is_asked_for_the_runs_own_is_shown(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "rank")
    tls = Tls(str(pair.certificate), str(pair.key), str(pair.certificate))
    with rank(tls=tls) as port:
        assert ask(port, Access(str(pair.certificate), str(pair.key)), tls=True).values is not None
        assert ask(port, Access(str(pair.certificate)), tls=True).problem is not None


@pytest.mark.parametrize(
    ("says", "problem"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\nhello", "what answers there is no rank of a training"),
        (b"HTTP/1.1 200 OK\r\n\r\npartial_fc_world_size{ 1\n\xff\x00", "what answers there is no rank of a training"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1/\r\n\r\n", "it answers 302"),
        (b"SSH-2.0-OpenSSH\r\n", "SSH-2.0-OpenSSH"),
        (b"", "remote end closed connection"),
    ],
)
def test_what_is_no_rank(says: bytes, problem: str) -> None:
    with talker(says) as port:
        assert problem.lower() in (ask(port).problem or "").lower()


def test_one_that_talks_without_end_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_BYTES", 1 << 16)
    with talker(b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * (1 << 16), times=1000) as port:
        assert ask(port).problem == "it answers more than metrics"


def test_those_that_keep_silent_are_waited_for_once_all_together() -> None:
    with talker(b"", pause=30) as silent, rank(3) as port:
        begin = time.monotonic()
        answers = scrape(at(*[silent] * 3, port), Access(), seconds=1.0)
        # The 30 seconds of one would show.
        assert time.monotonic() - begin < 20
    assert [answer.problem for answer in answers[:3]] == ["no answer in 1 s"] * 3
    assert answers[3].get("rank") == 3


@pytest.mark.parametrize("place", ["", "nothing", ":9400", "host:", "host:x", "host:99999", "[::1", "a\nb:1", "\0:1"])
def test_a_target_that_is_none_is_a_problem(place: str) -> None:
    (answer,) = scrape([{"targets": [place], "labels": {"run": "r", "rank": "x"}}], Access())
    assert answer.rank == -1 and answer.values is None and answer.problem
    assert answer.address.isprintable()


def test_no_targets() -> None:
    assert scrape([], Access()) == []


@given(st.text(alphabet=st.sampled_from('partial_fc x{}="\\,\n1e+#TYPELNab '), max_size=120))
def test_text_of_any_kind_has_values_or_none(text: str) -> None:
    assert isinstance(parse_values(text), dict)


SECTION = {"user": "me", "password_file": "", "tls_certificate": "cert.pem", "tls_key": None, "tls_client_ca": None}


def test_access_comes_of_the_configuration(tmp_path: Path) -> None:
    file, config = tmp_path / "password", {"config.yaml": os.geteuid()}
    file.write_text("s\u00e9cret\r\nsecond line\n", encoding="utf-8")
    access = read_access({**SECTION, "password_file": str(file)}, config)
    assert access == Access("cert.pem", None, "me", "s\u00e9cret", None)
    # The key is of use only where a client certificate is asked for.
    key = {**SECTION, "tls_key": str(file)}
    assert read_access(key, config).key is None
    assert read_access({**key, "tls_client_ca": "ca.pem"}, config).key == str(file)


@pytest.mark.parametrize("content", [b"word \n", b" word\r\nmore\n", "s\u00e9cret two\t".encode()])
def test_the_password_is_what_the_endpoint_reads(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "password"
    file.write_bytes(content)
    file.chmod(0o600)
    access = read_access({**SECTION, "password_file": str(file)}, {"config.yaml": os.geteuid()})
    assert access.password == read_password(str(file)) == content.decode().split("\n")[0].strip()


@pytest.mark.parametrize("section", [None, [], "text", {"user": 3, "password_file": []}, {3: 4}])
def test_a_section_of_another_kind_asks_for_nothing(section: object) -> None:
    assert read_access(section, {}) == Access()


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "no such file or directory"), (b"\xff\n", "can't decode byte"), ("\0", "null byte"), ("/", "regular")],
)
def test_a_password_that_cant_be_read_is_a_problem(tmp_path: Path, content: bytes | str | None, reason: str) -> None:
    file = str(tmp_path if content == "/" else tmp_path / "password") + (content if isinstance(content, str) else "")
    if isinstance(content, bytes):
        Path(file).write_bytes(content)
    access = read_access({**SECTION, "password_file": file}, {"config.yaml": os.geteuid()})
    assert access.password is None
    assert (access.problem or "").startswith("metrics.password_file isn't used: ") and reason in (access.problem or "")


def test_a_pipe_in_a_secrets_place_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "password")
    access = read_access({**SECTION, "password_file": str(tmp_path / "password")}, {"config.yaml": os.geteuid()})
    assert access.password is None and "no regular file" in (access.problem or "")


@pytest.mark.parametrize("name", ["config.yaml", "targets/run.json"])
def test_nobody_has_the_secrets_of_others_sent_to_a_port_of_his(tmp_path: Path, name: str) -> None:
    need_root()
    file = tmp_path / "password"
    file.write_text("mine\n")
    section = {**SECTION, "password_file": str(file), "tls_key": str(file), "tls_client_ca": "ca.pem"}
    owners = {"config.yaml": os.geteuid(), "targets/run.json": os.geteuid()}
    assert read_access(section, owners).password == "mine"
    owners[name] = 12345
    access = read_access(section, owners)
    assert access.password is None and access.key is None
    assert (access.problem or "").count(f"{name} belongs to another user") == 2
    os.chown(file, 12345, -1)
    assert read_access(section, owners).password == "mine", "the other's own file"


@contextlib.contextmanager
def listening() -> Iterator[tuple[int, list[bytes]]]:
    """Somebody who notes what he is told; his port, and that."""
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client, _ = listener.accept()
                    with client, contextlib.suppress(OSError):
                        heard.append(client.recv(1 << 16))

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1], heard
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(30)


def run_with_password(folder: Path, port: int, **metrics: Any) -> Path:
    """A run whose rank 0 is said to be at a port."""
    run = make_run(folder)
    (folder.parent / "password").write_text("secret\n")
    section = {"user": "me", "password_file": str(folder.parent / "password"), **metrics}
    (run / "config.yaml").write_text(yaml.safe_dump({"metrics": section}))
    write_targets(run, at(port))
    return run


TOKEN = base64.b64encode(b"me:secret")


def test_a_password_goes_to_the_runs_own_ports(tmp_path: Path) -> None:
    with listening() as (port, heard):
        read(run_with_password(tmp_path / "run", port))
    assert TOKEN in heard[0]


def test_a_foreign_folder_with_links_to_a_victims_files_gets_no_password(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "his").mkdir()
    with listening() as (port, heard):
        mine = run_with_password(tmp_path / "mine" / "run", port)
        his = run_with_password(tmp_path / "his" / "run", port)
        (his / "config.yaml").unlink()
        (his / "config.yaml").symlink_to(mine / "config.yaml")
        notes = read(his).notes
        assert "config.yaml can't be read (it is a link)" in notes
        assert len(heard) == 1 and TOKEN not in heard[0]
        # A link in the place of the targets leads nowhere.
        targets_file(mine).unlink()
        targets_file(mine).symlink_to(targets_file(his))
        assert "targets/run.json can't be read (it is a link): no rank is asked" in read(mine).notes
        assert len(heard) == 1


@pytest.mark.parametrize("whose", ["config", "targets"])
def test_a_file_of_another_user_gets_no_password(tmp_path: Path, whose: str) -> None:
    need_root()
    with listening() as (port, heard):
        run = run_with_password(tmp_path / "run", port)
        os.chown(run / "config.yaml" if whose == "config" else targets_file(run), 12345, -1)
        facts = read(run)
    assert len(heard) == 1 and b"GET" in heard[0] and TOKEN not in heard[0]
    assert any("belongs to another user" in note for note in facts.notes)


def test_a_run_with_a_certificate_is_asked_encrypted_whatever_the_targets_say(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "rank")
    with listening() as (port, heard):
        read(run_with_password(tmp_path / "run", port, tls_certificate=str(pair.certificate)))
    assert heard and not [said for said in heard if b"GET" in said or TOKEN in said]


def test_of_a_chain_only_the_first_certificate_is_the_runs(tmp_path: Path) -> None:
    authority = make_pair(tmp_path, "authority")
    run, other = (make_signed(tmp_path, name, authority) for name in ("run", "other"))
    with rank(tls=Tls(str(run.certificate), str(run.key))) as port:
        assert ask(port, Access(str(run.certificate)), tls=True).values is not None
    with rank(tls=Tls(str(other.certificate), str(other.key))) as port:
        answer = ask(port, Access(str(run.certificate)), tls=True)
        assert answer.values is None and "isn't trusted" in (answer.problem or "")


def make_signed(folder: Path, name: str, authority: Pair) -> Pair:
    """A certificate with that of its authority behind it, under a name of its own."""
    pair, request = Pair(folder / f"{name}.pem", folder / f"{name}.key"), folder / f"{name}.csr"
    made = ["openssl", "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    made += ["-subj", f"/CN={name}", "-keyout", str(pair.key), "-out", str(request)]
    signed = ["openssl", "x509", "-req", "-in", str(request), "-CA", str(authority.certificate), "-CAkey"]
    signed += [str(authority.key), "-CAcreateserial", "-days", "2", "-out", str(pair.certificate)]
    for command in (made, signed):
        subprocess.run(command, check=True, capture_output=True, timeout=60)
    with pair.certificate.open("ab") as file:
        file.write(authority.certificate.read_bytes())
    pair.key.chmod(0o600)
    return pair


def need_root() -> None:
    if os.geteuid() != 0:
        lacks("root", "files of another user can't be made")
