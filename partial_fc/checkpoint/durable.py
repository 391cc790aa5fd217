"""Files that are on the disk, not only in the machine's memory, and what they hold. Errors name their file."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

_BLOCK = 4 << 20
# Not every file system knows fsync of a folder.
_NO_FOLDER_SYNC = frozenset((errno.EINVAL, errno.ENOTSUP))


def sum_file(path: Path, *, sync: bool = False) -> tuple[int, str]:
    """Read a file through.

    Args:
        path: the file.
        sync: bring it to the disk as well.

    Returns:
        (size in bytes, SHA-256 in lower-case hexadecimal).

    Raises:
        OSError: with its file name.
    """
    digest, size = hashlib.sha256(), 0
    block = memoryview(bytearray(_BLOCK))
    with _naming(path), open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
            size += count
        if sync:
            os.fsync(file.fileno())
    return size, digest.hexdigest()


def write_file(path: Path, content: bytes) -> None:
    """Write a file and bring it to the disk; its name is there for good once :func:`sync_folder` was called.

    Raises:
        OSError: with its file name.
    """
    with _naming(path), open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_file(path: Path) -> None:
    """Bring a file's bytes to the disk.

    Raises:
        OSError: with its file name. The pages may be gone then, and a second call would report success.
    """
    with _naming(path), open(path, "rb", buffering=0) as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where its file system can.

    Raises:
        OSError: with its file name.
    """
    with _naming(folder):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in _NO_FOLDER_SYNC:
                raise
        finally:
            os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, for good; nothing where it is there.

    Raises:
        OSError: with its file name.
    """
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for place in missing:
        sync_folder(place.parent)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Give errors of a file that is open already, such as a full disk, the file's name."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
