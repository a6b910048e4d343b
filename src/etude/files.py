"""How files are written: whole or not at all, never through a link, and new ones over nothing."""

import contextlib
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

UNFINISHED = ".unfinished-"  # begins the name of what a kill leaves behind
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)  # Windows has no such flag


def unfinished(folder: Path) -> Path:
    """A name in `folder` that no other process uses, for what is not whole yet."""
    return folder / f"{UNFINISHED}{secrets.token_hex(8)}"


def leftovers(folder: Path) -> list[Path]:
    """What kills left behind in `folder`."""
    found = folder.glob(f"{UNFINISHED}*")
    return [path for path in found if re.fullmatch(r"\.unfinished-[0-9a-f]{16}", path.name)]


def clear(folder: Path) -> None:
    """Delete what kills left behind in `folder`, which nobody else may be writing in."""
    for path in leftovers(folder):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A new folder in `folder` to make files in; what is still in it at the end goes with it."""
    work = unfinished(folder)
    work.mkdir()
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def beside(file: Path, content: bytes) -> Iterator[Path]:
    """A new file on the disk with `content`, in the folder of `file`, to be given that name."""
    work = unfinished(file.parent)
    try:
        descriptor = os.open(work, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_LINK, 0o666)
        with open(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        yield work
    except OSError as error:
        if error.filename == str(work):  # the name that the user knows
            error.filename = str(file)
        raise
    finally:
        with contextlib.suppress(OSError):
            work.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """Write `file` whole or not at all, in place of what has its name; a link itself is replaced."""
    with beside(file, text.encode()) as work:
        replace(work, file)


def write_new(file: Path, content: bytes) -> None:
    """Write `file` whole or not at all.

    Raises:
        FileExistsError: something has its name, be it a link that leads nowhere; it stays as it is.
    """
    with beside(file, content) as work:
        place(work, file)


def place(work: Path, file: Path) -> None:
    """Give the finished file `work` the name `file`, which must be free.

    Raises:
        FileExistsError: it is not.
    """
    try:
        os.link(work, file)
        work.unlink()
    except FileExistsError:
        raise FileExistsError(17, "File exists", str(file)) from None
    except OSError:  # a file system without hard links
        if os.path.lexists(file):
            raise FileExistsError(17, "File exists", str(file)) from None
        work.rename(file)
    flush(file.parent)


def replace(work: Path, file: Path) -> None:
    """Give the finished file `work` the name `file`, in place of what has it."""
    work.replace(file)
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
