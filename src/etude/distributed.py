"""One of several processes: who this one is, what all must have in common, and who speaks.

torchrun (or `accelerate launch`, which calls it) starts the processes and tells each by its
environment who it is. Without such a launcher there is one process, and all of this does nothing.
"""

import contextlib
import datetime
import hashlib
import os
import re
import signal
import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from etude.errors import UserError

if TYPE_CHECKING:
    import torch


def why_not_launched(environment: Mapping[str, str]) -> str | None:
    """What is wrong with what `environment` says of this process's place among others; None if nothing.

    Nothing at all, or WORLD_SIZE 1 with no RANK but 0, is one process by itself.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    given = {name: environment[name] for name in names if name in environment}
    if given in ({}, {"WORLD_SIZE": "1"}, {"RANK": "0", "WORLD_SIZE": "1"}):
        return None
    with contextlib.suppress(KeyError, ValueError):
        rank, world, _ = (int(environment[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
        local = int(environment.get("LOCAL_RANK", rank))
        if environment["MASTER_ADDR"] and 0 <= rank < world and 0 <= local < world:
            return None
    named = ", ".join(f"{name}={value[:40]!r}" for name, value in given.items())
    return (
        f"{named} in the environment: of N processes each has WORLD_SIZE=N, a RANK and a LOCAL_RANK from "
        "0 to N-1, MASTER_ADDR and MASTER_PORT. They may be left over from a launcher. For one process: "
        f"unset {' '.join(given)}. For several: torchrun --nproc_per_node N -m etude.train_with_config "
        "CONFIG sets them all"
    )


_whole = why_not_launched(os.environ) is None  # else `check` says so, and this one process speaks
RANK = int(os.environ.get("RANK", 0)) if _whole else 0
WORLD = int(os.environ.get("WORLD_SIZE", 1)) if _whole else 1
FIRST = RANK == 0  # it speaks and writes for all
one_is_gone = False  # whether another process of this training is known to have ended
# The programs that are one process, whatever the environment says.
ALONE = ("init", "evaluate", "chat", "verify", "reproduce")
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
    """Refuse what `accelerate launch` asks for and the trainer would not do, or do wrong.

    `mixed_precision` is the configuration's: no, fp16 or bf16.

    Raises:
        UserError: a model spread over the processes, or another number format than the configuration's.
    """
    spread = [
        key
        for key, value in os.environ.items()
        if re.fullmatch("ACCELERATE_USE_(FSDP|DEEPSPEED|MEGATRON_LM|PARALLELISM_CONFIG)", key)
        and value.lower() == "true"
    ]
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", mixed_precision):
        spread.append("ACCELERATE_MIXED_PRECISION")
    if spread:
        raise UserError(
            f"{', '.join(f'{key}={os.environ[key]}' for key in spread)} in the environment, from `accelerate "
            f"launch`: Etude gives each process the whole base, in the configuration's number format "
            f"({mixed_precision}). Use torchrun; where the base does not fit: model.quantization: int8 or nf4"
        )


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
