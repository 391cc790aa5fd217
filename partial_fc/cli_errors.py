"""How commands end: an expected error is one line and an exit code."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from partial_fc.errors import PartialFCError

_PEER_GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Timed out waiting",
    "timeout caused",
    "Broken pipe",
)
# torchrun's agent ends all ranks of a machine when one has ended: the one that shows the line comes first.
_SHOWN_SECONDS = 10.0


@contextmanager
def one_line_errors(exit_code: int = 1) -> Iterator[None]:
    """An expected error becomes a line and the exit code; one of all ranks is shown by the first of a machine."""
    from torch.distributed import DistError

    try:
        yield
    except PartialFCError as error:
        if error.rank is not None:
            print(f"error: rank {error.rank}: {error}", file=sys.stderr, flush=True)
        elif os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(_SHOWN_SECONDS)
        leave(exit_code)
    except KeyboardInterrupt:
        leave(130)
    except DistError as error:
        _other_rank_stopped(error)
    except RuntimeError as error:
        # gloo reports a peer that is gone as a plain RuntimeError.
        if "WORLD_SIZE" not in os.environ or not any(sign in str(error) for sign in _PEER_GONE):
            raise
        _other_rank_stopped(error)


def leave(code: int) -> NoReturn:
    """End now. Other ranks may be gone: tearing the process group down in order could wait for them."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _other_rank_stopped(error: BaseException) -> NoReturn:
    first = str(error).splitlines()[0]
    print(f"rank {os.environ.get('RANK', '0')} stops: another rank is gone ({first})", file=sys.stderr, flush=True)
    leave(1)
