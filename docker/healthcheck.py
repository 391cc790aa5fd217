"""Whether the training in this container makes progress: asks local rank 0's ``/healthz``, and says what it answers.

Exit code 0: it does. 1: it doesn't (the line says what it waits for), or nothing answers.

``HEALTH_URL`` is where to ask, ``http://127.0.0.1:9400/healthz`` unasked; with ``metrics.tls_certificate`` it starts
with ``https``. ``HEALTH_CERTIFICATE`` is a PEM file with a client's certificate and key, for ``metrics.tls_client_ca``.
"""

from __future__ import annotations

import os
import ssl
import sys
import urllib.error
import urllib.request

URL = "http://127.0.0.1:9400/healthz"
# Less than the time that the image's HEALTHCHECK gives, so that there is a line to read.
SECONDS = 8


def ask(url: str, certificate: str | None) -> tuple[bool, str]:
    """Whether all is well, and a line on it.

    Args:
        url: of the endpoint.
        certificate: a client's PEM file, or None.
    """
    # It's this container's loopback: the certificate, made for another name, proves nothing here.
    context = ssl._create_unverified_context()
    if certificate:
        try:
            context.load_cert_chain(certificate)
        except OSError as error:
            return False, f"HEALTH_CERTIFICATE is {certificate}, expected a PEM file with certificate and key: {error}"
    # No proxy stands between a container and itself, whatever the environment says.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    try:
        with opener.open(url, timeout=SECONDS) as answer:
            return answer.status == 200, _line(answer.read(1000))
    except urllib.error.HTTPError as error:
        return False, f"{error.code}: {_line(error.read(1000))}"
    except (OSError, ValueError) as error:
        return False, f"{url} doesn't answer: {error}"


def _line(body: bytes) -> str:
    return body.decode(errors="replace").strip()


def main() -> None:
    """Print the line, and exit with 0 or 1."""
    well, line = ask(os.environ.get("HEALTH_URL", URL), os.environ.get("HEALTH_CERTIFICATE"))
    print(line)
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()
