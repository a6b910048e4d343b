import pytest
import torch

from etude.errors import UserError
from etude.models import device


@pytest.fixture
def machine(monkeypatch):
    """Pretends to be a machine: with a GPU of some compute capability, an Apple GPU, a CPU that has something."""

    def pretend(cuda=None, mps=False, has=None):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda is not None)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Test GPU")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(
            torch.cpu,
            "get_capabilities",
            lambda: {"cpu_name": "Test CPU"} | ({has: True} if has else {}),
        )

    return pretend


@pytest.mark.parametrize(
    ("here", "asked", "name", "dtype", "reason"),
    [
        ({}, {}, "cpu", "float32", "auto: it has no instructions for bf16"),
        ({"has": "amx_bf16"}, {}, "cpu", "bfloat16", "has instructions for bf16"),
        ({"has": "avx512_bf16"}, {}, "cpu", "bfloat16", "has instructions for bf16"),
        ({"has": "amx_bf16"}, {"dtype": "float32"}, "cpu", "float32", "set by model.dtype"),
        ({}, {"bf16": True}, "cpu", "bfloat16", "training.bf16"),
        ({"mps": True}, {}, "mps", "float32", "exact there"),
        ({"cuda": (7, 5)}, {}, "cuda", "float16", "has no bf16"),
        ({"cuda": (8, 0)}, {}, "cuda", "bfloat16", "computes bf16"),
        ({"cuda": (9, 0)}, {"fp16": True}, "cuda", "float16", "training.fp16"),
        ({"cuda": (9, 0)}, {"dtype": "float32", "bf16": True}, "cuda", "float32", "set by"),
        (
            {"cuda": (9, 0), "mps": True},
            {"use_cpu": True},
            "cpu",
            "float32",
            "no instructions for bf16",
        ),
    ],
)
def test_choice_and_its_reason(machine, here, asked, name, dtype, reason):
    machine(**here)
    chosen = device.choose(**asked)
    assert (chosen.name, chosen.dtype) == (name, dtype)
    assert reason in chosen.why and chosen.why.startswith(name)
    assert chosen.torch_dtype is getattr(torch, dtype)


@pytest.mark.parametrize(
    ("here", "asked", "phrase"),
    [
        ({}, {"fp16": True}, "training.fp16 is true, but there is no GPU here (Test CPU"),
        ({}, {"dtype": "float16"}, "model.dtype is float16, but there is no GPU"),
        ({"cuda": (9, 0)}, {"dtype": "float16", "use_cpu": True}, "Set training.fp16: false"),
        ({"cuda": (7, 5)}, {"bf16": True}, "Test GPU has no bfloat16; set training.fp16: true"),
    ],
)
def test_formats_that_the_device_lacks(machine, here, asked, phrase):
    machine(**here)
    with pytest.raises(UserError) as caught:
        device.choose(**asked)
    assert phrase in str(caught.value)


def test_the_machine_at_hand():
    chosen = device.choose(use_cpu=True)
    assert chosen.name == "cpu" and f"{torch.get_num_threads()} threads" in chosen.why
