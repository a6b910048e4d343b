"""How files are written: whole or not at all, never through a link, and new ones over nothing."""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

UNFINISHED = ".unfinished-"  # begins the name of what a kill leaves behind
TEXT_LIMIT = 256 * 2**20  # bytes of a JSON file
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)  # Windows has no such flag


def leftovers(folder: Path) -> list[Path]:
    """What kills left behind in `folder`: names that `scratch` gives, and no other."""
    return list(folder.glob(UNFINISHED + "[0-9a-f]" * 16))


def clear(folder: Path) -> None:
    """Delete what kills left behind in `folder`, which nobody else may be writing in."""
    for path in leftovers(folder):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A new folder in `folder` to make files in; what is still in it at the end is deleted with it."""
    work = folder / f"{UNFINISHED}{secrets.token_hex(8)}"
    work.mkdir()
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write_text(file: Path, text: str, new: bool = False) -> None:
    """Write `file` whole or not at all, as `put` does."""
    with scratch(file.parent) as work:
        (work / file.name).write_bytes(text.encode())
        put(work / file.name, file, new)


def put(work: Path, file: Path, new: bool = False) -> None:
    """Give the finished file `work` the name `file`: in place of what has it, a link too, or over nothing.

    Raises:
        FileExistsError: `new`, and something has that name, be it a link that leads nowhere.
    """
    flush(work)
    if not new:
        work.replace(file)
    else:
        try:
            os.link(work, file)
        except OSError as error:  # the name is taken, or the file system has no hard links
            if os.path.lexists(file):
                raise FileExistsError(errno.EEXIST, "File exists", str(file)) from error
            work.rename(file)
    flush(file.parent)


def append(file: Path, text: str) -> None:
    """Add `text` to the end of `file`, made if it is not there.

    Raises:
        OSError: it is a link.
    """
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | _NO_LINK, 0o666)
    with open(descriptor, "ab") as stream:
        stream.write(text.encode(errors="replace"))


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folders, and writes names by itself
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(file: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def usual_mode(path: Path) -> None:
    """Give `path` the mode that a new file or folder has here, by the umask.

    What was written through a temporary file, as safetensors and mkdtemp do, only its owner may read.
    """
    mask = os.umask(0o077)
    os.umask(mask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


# --- reading what others wrote ---


def expanded(name: str) -> Path:
    """The path that a user typed, with ~ for the home; of a user who does not exist, unchanged."""
    return Path(os.path.expanduser(name))


def read_bytes(path: Path, limit: int) -> bytes:
    """The bytes of a regular file: a pipe, a device or a folder would hang or never end.

    Raises:
        OSError: not there, no regular file, or larger than `limit` bytes.
    """
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    if facts.st_size > limit:
        size = f"{facts.st_size:,} bytes, and at most {limit:,} are read"
        raise OSError(errno.EFBIG, size, str(path))
    return path.read_bytes()


def read_text(path: Path, limit: int = TEXT_LIMIT) -> str:
    """The text of a regular UTF-8 file.

    Raises:
        OSError, UnicodeDecodeError: it cannot be read as that.
    """
    return read_bytes(path, limit).decode("utf-8-sig")


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object from a file.

    Raises:
        ValueError: what is wrong, without the file's name.
    """
    try:
        value = json.loads(read_text(path))
    except (OSError, RecursionError) as error:
        raise ValueError(getattr(error, "strerror", "nested too deeply")) from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value
