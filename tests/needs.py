"""What a test needs of the machine beside Python: skipped where it isn't there, failed where it has to be."""

from __future__ import annotations

import os
import shutil
from typing import NoReturn

import pytest

# Asks for what would otherwise be skipped: a comma-separated list of what is given to `lacks`.
REQUIRED = "PARTIAL_FC_REQUIRE"


def need_programs(what: str, *programs: str) -> None:
    """Skip the test where one of these programs isn't on the path: see :func:`lacks`."""
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        lacks(what, f"{', '.join(missing)} is not on the path")


def lacks(what: str, reason: str) -> NoReturn:
    """Skip the test, or fail it where ``PARTIAL_FC_REQUIRE`` asks for ``what``.

    Args:
        what: one word, such as ``prometheus``.
        reason: what isn't there.
    """
    if what in os.environ.get(REQUIRED, "").split(","):
        pytest.fail(f"{REQUIRED} asks for {what}: {reason}")
    pytest.skip(f"{what}: {reason}")
