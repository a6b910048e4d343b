"""Which device and which number format a model runs on, each with the reason why."""

import contextlib
import ctypes
import gc
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from etude import distributed
from etude.config.schema import Training
from etude.errors import UserError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Device:
    """Where a model runs: a torch device name, a dtype name, and why they were chosen."""

    name: str
    dtype: str
    why: str

    @property
    def torch_dtype(self) -> "torch.dtype":
        """The torch dtype of that name."""
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


def choose(
    dtype: str = "auto", use_cpu: bool = False, fp16: bool = False, bf16: bool = False
) -> Device:
    """Pick the device and the dtype of the base's weights.

    With mixed precision (`fp16`, `bf16`) `auto` holds the base in that format too.

    Raises:
        UserError: a format that the device cannot compute in.
    """
    import torch

    if not use_cpu and torch.cuda.is_available():
        if distributed.WORLD > 1 and "LOCAL_RANK" not in os.environ:
            raise UserError(
                "LOCAL_RANK is not set in the environment, so this process does not know which GPU is its "
                "own: give it its number on this machine (0, 1, ...), or let torchrun start them"
            )
        if "LOCAL_RANK" in os.environ:  # torchrun: a GPU for each process
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        name, where = "cuda", torch.cuda.get_device_name()
        capability = torch.cuda.get_device_capability()
        # bfloat16 came with Ampere (8.0); before it, float16 is the fast 16-bit format.
        automatic, why = (
            ("bfloat16", "computes bf16") if capability >= (8, 0) else ("float16", "has no bf16")
        )
    elif not use_cpu and torch.backends.mps.is_available():
        name, where, automatic, why = "mps", "Apple GPU", "float32", "float32 is exact there"
    else:
        name = "cpu"
        facts = torch.cpu.get_capabilities()
        where = f"{facts.get('cpu_name') or 'CPU'}, {torch.get_num_threads()} threads"
        # bf16 without instructions of its own is several times slower than float32 on a CPU.
        automatic, why = (
            ("bfloat16", "has instructions for bf16")
            if facts.get("amx_bf16") or facts.get("avx512_bf16")
            else ("float32", "has no instructions for bf16")
        )
    if name == "cpu" and (fp16 or dtype == "float16"):
        key = "training.fp16 is true" if fp16 else "model.dtype is float16"
        raise UserError(
            f"{key}, but there is no GPU here ({where}); float16 needs one. "
            "Set training.fp16: false and model.dtype: auto"
        )
    if bf16 and automatic == "float16":
        raise UserError(
            f"training.bf16 is true, but {where} has no bfloat16; set training.fp16: true instead"
        )
    if dtype != "auto":
        chosen, reason = dtype, "asked for by model.dtype"
    elif fp16 or bf16:
        chosen, reason = ("float16", "training.fp16") if fp16 else ("bfloat16", "training.bf16")
    else:
        chosen, reason = automatic, f"auto: it {why}"
    return Device(name, chosen, f"{name} ({where}), {chosen} ({reason})")


def mixed_precision(training: Training, device: str) -> "torch.autocast":
    """The mixed precision of training.fp16 or training.bf16 on `device`; without effect for neither."""
    import torch

    half = torch.float16 if training.fp16 else torch.bfloat16
    return torch.autocast(device, half, enabled=training.fp16 or training.bf16)


def available(device: str) -> int:
    """Bytes that a process may still take on `device`: free or reclaimable, within its limits."""
    if device == "cuda":
        import torch

        return int(torch.cuda.mem_get_info()[0])
    import psutil

    return min([int(psutil.virtual_memory().available), *_left_in_groups()])


def _left_in_groups(
    root: Path = Path("/sys/fs/cgroup"), member: Path = Path("/proc/self/cgroup")
) -> list[int]:
    """What the memory limits of the process's control groups (containers, services) leave, in bytes.

    A group's usage counts cached files, which are dropped before anything fails.
    """
    found: list[int] = []
    if not member.exists():  # no Linux
        return found
    for line in member.read_text().splitlines():
        _, kinds, path = line.split(":", 2)
        if kinds not in ("", "memory"):
            continue
        home = root / kinds
        names = ("memory.max", "memory.current", "inactive_file")
        if kinds:  # version 1
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        # Within a container the path may be the host's; the group itself is then the root.
        for folder in {home, *(home / path.strip("/") / part for part in ("", "..", "../.."))}:
            with contextlib.suppress(OSError, ValueError, KeyError):  # no limit there: "max"
                limit = int((folder / names[0]).read_text())
                used = int((folder / names[1]).read_text())
                facts = dict(
                    line.split() for line in (folder / "memory.stat").read_text().splitlines()
                )
                found.append(max(0, limit - used + int(facts[names[2]])))
    return found


def used_memory(device: str, peak: bool = False) -> int:
    """Bytes that this process holds on `device`, or held at most; 0 where the system does not tell."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    field = "VmHWM" if peak else "VmRSS"
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024
    return 0


def out_of_memory(error: BaseException) -> bool:
    """Whether a library says by `error` that the memory of the device is used up."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def free_memory() -> None:
    """Give the memory of models that are no longer referred to back to the system."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # glibc keeps freed memory unless told
        ctypes.CDLL("libc.so.6").malloc_trim(0)
