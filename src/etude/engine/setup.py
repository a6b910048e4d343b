"""What makes a training fast, decided in one place: its passes, its base in int8, its layers compiled."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from etude.config.schema import Config
from etude.conversation.encoding import Example
from etude.engine import packing
from etude.errors import UserError
from etude.models.device import Device, mixed_precision

log = logging.getLogger(__name__)

# About so many tokens of the training rows show the int8 base how large its inputs get.
CALIBRATION = 2048


@dataclass(frozen=True)
class Engine:
    """How a training computes.

    Attributes:
        cutter: cuts its examples into passes.
        int8: whether the frozen layers of the base are in int8.
        compiled: whether the decoder layers are compiled.
        notices: what is slower than it could be, each with the reason.
    """

    cutter: packing.Cutter
    int8: bool
    compiled: bool
    notices: list[str]

    def __str__(self) -> str:
        padded = self.cutter.why_padded
        done = ["padded passes" if padded else f"packed passes of {self.cutter.budget} tokens"]
        done += ["int8 base"] * self.int8 + ["compiled layers"] * self.compiled
        return ", ".join(done)


def configure_engine(
    model: Any, settings: Config, place: Device, examples: Sequence[Example], steps: int
) -> Engine:
    """Make `model` fast, in place, for a training of `steps` steps on `place`.

    A model on the meta device is a shape without numbers: what the real one will get is decided by
    what a shape shows, and nothing is measured, proven, quantised or compiled.

    Raises:
        UserError: int8 where there is no product for it.
    """
    from etude.engine import compiling, int8

    training, shape = settings.training, model.device.type == "meta"
    rows, max_length = training.batch_size, settings.dataset.max_length
    cutter = packing.Cutter.of(model, rows, max_length, examples, place.name)
    notices = []
    if cutter.why_padded:
        notices.append(f"plain padded batches instead of packed ones: {cutter.why_padded}")
    step = examples[: training.rows_per_step]
    tokens = steps * sum(batch.input_ids.numel() for batch in cutter(step))
    compiled = training.compile is True or (
        training.compile == "auto" and compiling.worth_it(model, tokens, place)
    )
    quantized = settings.model.quantization == "int8"
    if quantized and (reason := int8.why_not(model, place.name)):
        raise UserError(f"model.quantization: int8: {reason}. Set it to null")
    if quantized and not shape:
        few = max(4, CALIBRATION // max(map(len, examples[:CALIBRATION])))
        int8.quantize(model, cutter(examples[:few]), place.torch_dtype)
        cutter = replace(cutter, dtype=place.torch_dtype)
    if compiled and not shape:
        log.info("Compiling the decoder layers, about half a minute on two cores")
        # In the format in which the steps will run, or they would compile everything again.
        with mixed_precision(training, place.name):
            reason = compiling.compile_layers(model, next(cutter(step)))
        if reason:
            compiled = False
            notices.append(f"not compiled, so slower: {reason}")
    return Engine(cutter, quantized, compiled, notices)
