"""The folder of an export: new, and whole or not there."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from etude import files
from etude.errors import UserError, command
from etude.runs.folder import free_name


def check_free(out: Path) -> None:
    """Raise UserError where something has the name `out`, be it a link that leads nowhere."""
    if os.path.lexists(out):
        raise UserError(
            f"{out} exists and is not overwritten; give another name: {command(free_name(out))}"
        )


@contextlib.contextmanager
def new(out: Path) -> Iterator[Path]:
    """A folder to write the export in, which is named `out` at the end; after an error nothing is left of it.

    What a kill leaves has a name that begins with .unfinished-, beside `out`.

    Raises:
        UserError: something has the name `out`.
    """
    check_free(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with files.scratch(out.parent) as work:
        place = work / "export"
        place.mkdir()
        yield place
        for file in place.iterdir():
            files.usual_mode(file)
            files.flush(file)
        files.flush(place)
        check_free(out)  # another program may have taken it meanwhile
        place.rename(out)
        files.flush(out.parent)
