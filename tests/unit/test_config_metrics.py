from __future__ import annotations

from pathlib import Path

import pytest

from partial_fc.config import Config, load_config
from partial_fc.errors import ConfigError


def load(folder: Path, *overrides: str) -> Config:
    path = folder / "run.yaml"
    path.write_text("data: {path: faces}\ntrain: {steps: 100}\n", encoding="utf-8")
    return load_config(path, [f"metrics.{override}" for override in overrides])


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["user=ops"], "metrics.user: got ops, expected metrics.password_file with it"),
        (["password_file=p"], "metrics.password_file: got p, expected metrics.user with it"),
        (["tls_certificate=c"], "metrics.tls_certificate: got c, expected metrics.tls_key with it"),
        (["tls_key=k"], "metrics.tls_key: got k, expected metrics.tls_certificate with it"),
        (["tls_client_ca=a"], "metrics.tls_client_ca: got a, expected metrics.tls_certificate with it"),
        (["user=a:b", "password_file=p"], 'metrics.user: got "a:b", expected text that matches'),
        (["advertise="], None),
        (["address=0.0.0.0"], None),
        (['address="::"'], None),
        (["address=node-7.cluster"], None),
        (["address=a..b"], "metrics.address: got a..b, expected an address or a name of this machine"),
        (['address="*"'], "metrics.address: got"),
        (['address="[::1]"'], "metrics.address: got"),
        (['advertise=""'], "metrics.advertise: got"),
        *(
            ([f"advertise={host}"], "metrics.advertise: got")
            for host in (
                "http://node1",
                "node1:9400",
                '"[fd00::2]"',
                '"node 1"',
                "0.0.0.0",
                '"::"',
                "-a",
                "a..b",
                "x" * 300,
            )
        ),
        *(
            ([f"advertise={host}"], None)
            for host in ("node1", "gpu-1.example.org.", "10.0.0.7", '"fd00::2"', "a_pod.space", "localhost")
        ),
        (["tls_certificate=c", "tls_key=k", "tls_client_ca=a", "user=ops", "password_file=p"], None),
        (["address=0.0.0.0"], None),
    ],
)
def test_what_goes_together(tmp_path: Path, overrides: list[str], line: str | None) -> None:
    if line is None:
        load(tmp_path, *overrides)
        return
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, *overrides)
    assert line in str(raised.value) and "\n" not in str(raised.value).strip()
