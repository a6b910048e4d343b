"""One of several processes: who this one is, what all must have in common, and who speaks.

torchrun (or `accelerate launch`, which calls it) starts the processes and tells each by its
environment who it is. Without such a launcher there is one process, and all of this does nothing.
"""

import datetime
import hashlib
import os
from typing import TYPE_CHECKING, Any

from etude.errors import UserError

if TYPE_CHECKING:
    import torch

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
FIRST = RANK == 0  # it speaks and writes for all
# How long the launcher is asked who has spoken; it answers within milliseconds or is gone.
PATIENCE = datetime.timedelta(seconds=5)


# By these, `accelerate launch` tells how the model itself is to be spread over the processes.
SPREAD = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "--use_parallelism_config",
}


def check_launcher(mixed_precision: str) -> None:
    """Hold the launcher's wishes to what the trainer does; `mixed_precision` is no, fp16 or bf16.

    Raises:
        UserError: one process where several were asked for, a model that is to be spread over the
            processes, or another number format than the configuration's.
    """
    asked = [name for key, name in SPREAD.items() if os.environ.get(key, "").lower() == "true"]
    if asked:
        raise UserError(
            f"accelerate launch: {', '.join(asked)}: Etude gives each process the whole base and shares out "
            "the rows. Use torchrun, or `accelerate launch --multi_gpu`; where the base does not fit, "
            "model.quantization: int8 or nf4 holds it in a quarter or an eighth of its memory"
        )
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", mixed_precision):
        raise UserError(
            f"accelerate launch: --mixed_precision {precision}, but the configuration says {mixed_precision}. "
            "Leave it to the configuration: --mixed_precision no, and training.fp16 or training.bf16"
        )
    if "ACCELERATE_USE_CPU" in os.environ and "MASTER_ADDR" in os.environ and WORLD == 1:
        raise UserError(
            "`accelerate launch --cpu` starts one process, whatever --num_processes says. Start with "
            "`accelerate launch --multi_gpu --num_processes N` and set training.use_cpu: true, or use torchrun"
        )


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


def agree(facts: dict[str, str]) -> None:
    """Hold what the processes have, on several machines perhaps, against what the first one has.

    Raises:
        UserError: they differ; every process raises it.
    """
    every = gather(facts)
    differing = [
        f"{key}: {found[key]} in process {rank}, {every[0][key]} in process 0"
        for rank, found in enumerate(every)
        for key in facts
        if found[key] != every[0][key]
    ]
    if differing:
        raise UserError(
            f"The processes would not train the same: {'; '.join(differing):.2000}. Give each the same "
            "configuration, data and base, and one output.dir that every machine sees, or a copy of it"
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
