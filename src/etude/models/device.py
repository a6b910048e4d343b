"""Which device and which number format a model runs on, each with the reason why."""

import contextlib
import ctypes
import gc
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from etude.config.schema import Training
from etude.errors import UserError

if TYPE_CHECKING:
    import torch

CONTAINER = Path("/sys/fs/cgroup")  # the control group of a container, as it sees it


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
        if "LOCAL_RANK" in os.environ:  # torchrun: a GPU for each process
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        name, where = "cuda", torch.cuda.get_device_name()
        # bfloat16 came with Ampere (8.0); before it, float16 is the fast 16-bit format.
        new = torch.cuda.get_device_capability() >= (8, 0)
        automatic, why = ("bfloat16", "computes bf16") if new else ("float16", "has no bf16")
    elif not use_cpu and torch.backends.mps.is_available():
        name, where, automatic, why = "mps", "Apple GPU", "float32", "float32 is exact there"
    else:
        name, has = "cpu", torch.cpu.get_capabilities()
        where = f"{has.get('cpu_name') or 'CPU'}, {torch.get_num_threads()} threads"
        automatic, why = "float32", "has no instructions for bf16"  # several times slower so
        if has.get("amx_bf16") or has.get("avx512_bf16"):
            automatic, why = "bfloat16", "has instructions for bf16"
    if name == "cpu" and (fp16 or dtype == "float16"):
        key = "training.fp16 is true" if fp16 else "model.dtype is float16"
        reason = "training.use_cpu is true" if use_cpu else "there is no GPU here"
        raise UserError(
            f"{key}, but {reason} ({where}); float16 needs a GPU. "
            "Set training.fp16: false and model.dtype: auto"
        )
    if bf16 and automatic == "float16":
        raise UserError(
            f"training.bf16 is true, but {where} has no bfloat16; set training.fp16: true instead"
        )
    chosen, reason = automatic, f"auto: it {why}"
    if dtype != "auto":
        chosen, reason = dtype, "set by model.dtype"
    elif fp16 or bf16:
        chosen, reason = ("float16", "training.fp16") if fp16 else ("bfloat16", "training.bf16")
    return Device(name, chosen, f"{name} ({where}), {chosen} ({reason})")


def mixed_precision(training: Training, device: str) -> "torch.autocast":
    """The mixed precision of training.fp16 or training.bf16 on `device`; without effect for neither."""
    import torch

    half = torch.float16 if training.fp16 else torch.bfloat16
    return torch.autocast(device, half, enabled=training.fp16 or training.bf16)


def available(device: str) -> int:
    """Bytes that a process may still take on `device`: free or reclaimable, in its container's limit."""
    if device == "cuda":
        import torch

        return int(torch.cuda.mem_get_info()[0])
    import psutil

    free = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError, KeyError):  # no container, or no limit: "max"
        limit = int((CONTAINER / "memory.max").read_text())
        facts = dict(line.split() for line in (CONTAINER / "memory.stat").read_text().splitlines())
        # Not memory.current: it counts cached files, which are dropped before anything fails.
        free = min(free, max(0, limit - int(facts["anon"])))
    return free


def used_memory(device: str, peak: bool = False) -> int:
    """Bytes that this process holds on `device`, or held at most; 0 where there is no /proc."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    field = "VmHWM" if peak else "VmRSS"
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024
    return 0


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` is a library's, for want of memory on the device."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def free_memory() -> None:
    """Give the memory of models that are no longer referred to back to the system."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # glibc keeps freed memory by itself
        ctypes.CDLL("libc.so.6").malloc_trim(0)
