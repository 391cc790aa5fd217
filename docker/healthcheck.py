"""Whether the training in this container makes progress: asks local rank 0's ``/healthz``, and says what it answers.

Exit code 0: it does. 1: it doesn't (the line says what it waits for), or nothing answers.

``HEALTH_URL`` is where to ask, ``http://127.0.0.1:9400/healthz`` unasked; with ``metrics.tls_certificate`` it starts
with ``https``, with ``metrics.address=::1`` it is ``http://[::1]:9400/healthz``. ``HEALTH_CERTIFICATE`` is a PEM file
with a client's certificate and key, for ``metrics.tls_client_ca``.
"""

from __future__ import annotations

import http.client
import os
import ssl
import sys
import urllib.error
import urllib.request
from typing import Any

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
        with _open(opener, url) as answer:
            code, line = answer.status, answer.read(1000).decode(errors="replace").strip()
    except (OSError, ValueError) as error:
        return False, f"{url} doesn't answer: {error}"
    except http.client.HTTPException as error:
        # What these say may be lines of another protocol; repr() makes one of them.
        return False, f"{url} doesn't answer in HTTP: {error!r}"
    return code == 200, line if code == 200 else f"{code}: {line}"


def _open(opener: urllib.request.OpenerDirector, url: str) -> Any:
    try:
        return opener.open(url, timeout=SECONDS)
    except urllib.error.HTTPError as answer:
        # It has a status and a body, too.
        return answer


def main() -> None:
    """Print the line, and exit with 0 or 1."""
    well, line = ask(os.environ.get("HEALTH_URL", URL), os.environ.get("HEALTH_CERTIFICATE"))
    print(line)
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()
