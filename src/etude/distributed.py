"""One of several processes: who this one is, what all must have in common, and who speaks.

torchrun (or `accelerate launch`, which calls it) starts the processes and tells each by its
environment who it is. Without such a launcher there is one process, and all of this does nothing.
"""

import contextlib
import datetime
import hashlib
import logging
import os
import re
import signal
import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from etude.errors import UserError, first_line

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


def why_not_launched(environment: Mapping[str, str]) -> str | None:
    """What is wrong with what `environment` says of this process's place among others; None if nothing.

    Nothing at all, or WORLD_SIZE 1 with no RANK but 0, is one process by itself.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    given = {name: environment[name] for name in names if name in environment}
    if not given or (
        {"WORLD_SIZE": "1"}.items() <= given.items() <= {"WORLD_SIZE": "1", "RANK": "0"}.items()
    ):
        return None
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if not environment.get(name)]
    try:
        numbers = {name: int(value) for name, value in given.items()}
        int(environment.get("MASTER_PORT", ""))
        world = numbers.pop("WORLD_SIZE", 0)
        if not missing and all(0 <= number < world for number in numbers.values()):
            return None
    except ValueError:
        pass
    named = [*given, *["MASTER_PORT"] * bool(environment.get("MASTER_PORT"))]
    return (
        f"{', '.join(f'{name}={environment[name][:40]!r}' for name in named)} in the environment"
        f"{' without ' * bool(missing)}{', '.join(missing)}: of N processes each has WORLD_SIZE=N, a RANK and a "
        "LOCAL_RANK from 0 to N-1, MASTER_ADDR and MASTER_PORT. They may be left over from a launcher. For one "
        f"process: unset {' '.join(given)}. For several: torchrun --nproc_per_node N -m "
        "etude.train_with_config CONFIG sets them all"
    )


_whole = why_not_launched(os.environ) is None  # else `check` says so, and this one process speaks
RANK = int(os.environ.get("RANK", 0)) if _whole else 0
WORLD = int(os.environ.get("WORLD_SIZE", 1)) if _whole else 1
FIRST = RANK == 0  # it speaks and writes for all
one_is_gone = False  # whether another process of this training is known to have ended
# The programs that are one process, whatever the environment says.
ALONE = ("init", "evaluate", "chat", "verify", "reproduce")
WAIT = 1800  # seconds that the processes of a training wait for each other
# How long the launcher is asked who has spoken; it answers within milliseconds or is gone.
PATIENCE = datetime.timedelta(seconds=5)


def check(program: str) -> None:
    """Check what the environment says of this process's place among others, before `program` begins.

    Raises:
        UserError: half of what a launcher sets, or what cannot be; or several processes of a program
            that is one.
    """
    fault = why_not_launched(os.environ)
    if fault:
        raise UserError(fault)
    if WORLD > 1 and program in ALONE:
        raise UserError(
            f"{program}: it is one process, and by the environment this is process {RANK} of {WORLD}. Start "
            "it without torchrun; where no launcher started it: unset RANK LOCAL_RANK WORLD_SIZE"
        )


def check_launcher(mixed_precision: str) -> None:
    """Refuse what a launcher asks for and the trainer would not do, or do wrong.

    `mixed_precision` is the configuration's: no, fp16 or bf16.

    Raises:
        UserError: a model spread over the processes, another number format than the configuration's,
            or processes that mpirun started.
    """
    spread = [
        key
        for key in os.environ
        if re.fullmatch("ACCELERATE_USE_(FSDP|DEEPSPEED|MEGATRON_LM|PARALLELISM_CONFIG)", key)
        and os.environ[key].lower() == "true"
    ]
    if spread:
        raise UserError(
            f"{spread[0]}=true in the environment, from `accelerate launch`: Etude gives each process the whole "
            "base and shares out the rows. Use torchrun, or `accelerate launch --multi_gpu`; where the base "
            "does not fit, model.quantization: int8 or nf4 holds it in a quarter or an eighth of its memory"
        )
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", mixed_precision):
        raise UserError(
            f"accelerate launch: --mixed_precision {precision}, but the configuration says {mixed_precision}. "
            "Leave it to the configuration: --mixed_precision no, and training.fp16 or training.bf16"
        )
    # accelerate would take these up on a CPU, and each process train by itself.
    mpi = [
        key
        for key in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
        if os.environ.get(key, "1") not in ("", "0", "1")
    ]
    if mpi and WORLD == 1:
        raise UserError(
            f"{mpi[0]}={os.environ[mpi[0]]} in the environment: mpirun asks for several processes, and Etude's are "
            f"started by torchrun. For one process: unset {' '.join(mpi)}"
        )


@contextlib.contextmanager
def joining() -> Iterator[None]:
    """Say what the program waits for while the processes of a training that no torchrun started meet in the block.

    Raises:
        UserError: the others did not come.
    """
    if WORLD == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        yield
        return
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    log.warning(
        "process %d of %d (RANK, WORLD_SIZE) waits for the others at %s, for at most %d minutes; "
        "Ctrl-C ends it", RANK, WORLD, where, WAIT // 60,
    )  # fmt: skip
    try:
        # The libraries wait outside of Python, where its own handlers are not called.
        with on_signals(signal.SIG_DFL):
            yield
    except RuntimeError as error:
        if not re.search("gloo|nccl|store|socket|connect|address", str(error), re.I):
            raise
        raise UserError(
            f"process {RANK} of {WORLD} did not meet the others at {where} ({first_line(error):.200}). Start as "
            "many as WORLD_SIZE says, each with its RANK, or one alone: unset RANK LOCAL_RANK WORLD_SIZE"
        ) from None


@contextlib.contextmanager
def on_signals(handler: Any, *names: str) -> Iterator[None]:
    """Let `handler` take what ends a program from outside: by default SIGINT (Ctrl-C), SIGTERM, SIGHUP.

    In the main thread alone, for Python allows no other; and a SIGHUP that `nohup` turned off stays off.
    """
    main = threading.current_thread() is threading.main_thread()
    before = {
        number: signal.getsignal(number)
        for name in names or ("SIGINT", "SIGTERM", "SIGHUP")
        if main
        and (number := getattr(signal, name, None)) is not None  # Windows has no SIGHUP
        and not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN)
    }
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


def gather(value: Any) -> list[Any]:
    """`value` of every process, in the order of their ranks."""
    if WORLD == 1:
        return [value]
    import torch

    every: list[Any] = [None] * WORLD
    torch.distributed.all_gather_object(every, value)
    return every


def total(value: Any, device: "torch.device | str" = "cpu") -> "torch.Tensor":
    """The sum of a number or tensor over all processes."""
    import torch

    summed = torch.as_tensor(value, device=device)
    if WORLD > 1:
        torch.distributed.all_reduce(summed)
    return summed


def agree(facts: Mapping[str, object]) -> None:
    """Compare what the processes have, on several machines perhaps, with what the first one has.

    Raises:
        UserError: they differ; every process raises it.
    """
    if WORLD == 1:
        return
    # Long values by the beginning of their SHA-256: enough to tell two apart.
    short = {
        key: value
        if isinstance(value, str)
        else hashlib.sha256(repr(value).encode()).hexdigest()[:12]
        for key, value in facts.items()
    }
    every = gather(short)
    differing = [
        f"{key}: {found[key]} in process {rank}, {every[0][key]} in process 0"
        for rank, found in enumerate(every)
        for key in short
        if found[key] != every[0][key]
    ]
    if differing:
        raise UserError(
            f"The workers disagree on {'; '.join(differing):.2000}. Give each the same configuration, data "
            "and base, and one output.dir that every machine sees, or a copy of it"
        )


def first_to_say(text: str) -> bool:
    """Whether no other process on this machine has said `text` before: it is to be read once.

    The launcher's store counts, which is there before the processes know each other, and when one
    of them is gone.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not in its __all__

    machine, attempt = os.environ["GROUP_RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
    key = f"etude/{machine}/{attempt}/{hashlib.sha256(text.encode()).hexdigest()}"
    try:
        where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return TCPStore(*where, timeout=PATIENCE).add(key, 1) == 1
    except RuntimeError:  # the launcher is gone: rather twice than not at all
        return True
