"""Foreign code that must end, such as a chat template: tried in a child process, then kept on a timer."""

import gc
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

SECONDS = 1  # of processor time, so that a busy machine refuses nothing; a render takes 0.001
MEMORY = 2**29  # bytes beyond what the process has
OUT_OF_MEMORY = 3  # an exit code


class TooLong(Exception):
    """The code took longer than `SECONDS`."""


def why_unbounded(action: Callable[[], object]) -> str | None:
    """Run `action` in a forked child and say which bound it breaks, in time or memory; None if none.

    What a timer cannot interrupt, such as one product of huge numbers, ends with the child. Where
    there is no fork (Windows), nothing is tried. What `action` raises is no matter here.
    """
    if not hasattr(os, "fork"):
        return None
    import multiprocessing

    child = multiprocessing.get_context("fork").Process(target=_limited, args=(action,))
    with warnings.catch_warnings():
        # Python 3.12 warns of other threads' locks; the child takes none of theirs.
        warnings.simplefilter("ignore", DeprecationWarning)
        with _no_collection():  # in the child, too: it would walk and copy all that is here
            child.start()
    child.join(20 * SECONDS)
    if child.is_alive():
        child.kill()
        child.join()
    if child.exitcode in (OUT_OF_MEMORY, -signal.SIGABRT):  # Python's end, and a library's
        return f"takes more than {MEMORY >> 20} MB of memory"
    return None if child.exitcode == 0 else f"does not end within {SECONDS} second of work"


def _limited(action: Callable[[], object]) -> None:
    import resource

    # Soft limits, and no core file where they strike.
    pages = Path("/proc/self/statm")
    bounds = {resource.RLIMIT_CPU: SECONDS, resource.RLIMIT_CORE: 0}
    if pages.exists():
        size = int(pages.read_text().split()[0]) * resource.getpagesize()
        bounds[resource.RLIMIT_AS] = size + MEMORY
    for kind, bound in bounds.items():
        most = resource.getrlimit(kind)[1]  # `ulimit -v` may have set less
        bound = bound if most == resource.RLIM_INFINITY else min(bound, most)
        resource.setrlimit(kind, (bound, most))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a library's last words
    try:
        action()
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    except Exception:
        pass
    except BaseException:  # a panic of a library that is not Python
        os._exit(1)
    os._exit(0)


@contextmanager
def time_limit() -> Iterator[None]:
    """Raise `TooLong` in the block after `SECONDS` of processor time; on Unix, in the main thread."""
    if (
        not hasattr(signal, "SIGVTALRM")
        or threading.current_thread() is not threading.main_thread()
    ):
        yield
        return

    def strike(*_: object) -> None:
        raise TooLong

    before = signal.signal(signal.SIGVTALRM, strike)
    with _no_collection():
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, before)


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection in the block: in a large process one takes longer than `SECONDS`."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
