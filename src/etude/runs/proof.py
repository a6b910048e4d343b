"""Proof, in a new process, that a saved adapter works as it was trained.

`python -m etude.runs.proof RUN OUT` is the new process of the proof: it writes its result to OUT.
"""

import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etude import files
from etude.config.schema import Config
from etude.conversation.encoding import Example
from etude.data import dataset, splits
from etude.engine import packing
from etude.errors import UserError, shortage
from etude.models import device, loading, lora
from etude.runs import opening
from etude.runs.folder import PROOF, how_to_continue, write_file
from etude.runs.manifest import read_record

# Where the trainer measured no validation loss, so many examples are measured for the proof.
EXAMPLES = 64
# How far the loss in a new process may be from the training's: relative, and in nats.
EXACT = (1e-4, 1e-6)  # float32
ROUNDED = (0.02, 0.01)  # 16-bit numbers on either side
QUANTIZED = (0.05, 0.05)  # trained on an int8 base, used on the float one

log = logging.getLogger(__name__)


def expect(
    folder: Path,
    model: Any,
    settings: Config,
    examples: dict[str, list[Example]],
    fingerprints: dict[str, str],
    eval_loss: float | None,
) -> str:
    """Write to `folder` what a new process must find there; returns the adapter's SHA-256.

    That is the adapter's digest and the loss that `model` has: the trainer's validation loss, or
    where there is none, the loss of the first EXAMPLES examples. Of the data only fingerprints are
    written.
    """
    split = "validation" if "validation" in examples else "train"
    rows = len(examples[split]) if eval_loss is not None else min(EXAMPLES, len(examples[split]))
    loss = mean_loss(model, settings, examples[split][:rows]) if eval_loss is None else eval_loss
    tensors = lora.state(model)
    expected = {
        "sha256": lora.digest(tensors),
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": settings.model.quantization,
        "loss": {"split": split, "data": fingerprints[split], "rows": rows, "value": loss},
    }
    write_file(folder, PROOF, json.dumps(expected, indent=1, allow_nan=False))
    return str(expected["sha256"])


def mean_loss(model: Any, settings: Config, examples: Sequence[Example]) -> float:
    """Mean loss over all supervised tokens in nats, as the trainer's validation computes it.

    Raises:
        UserError: it is not finite; with the rows.
    """
    rows, max_length = settings.training.batch_size, settings.dataset.max_length
    was_training = model.training
    model.eval()
    with device.mixed_precision(settings.training, model.device.type):
        cutter = packing.Cutter.of(model, rows, max_length, examples)
        total, count = packing.total_loss(model, cutter(examples))
        found = [] if math.isfinite(total) else packing.culprits(model, cutter, examples)
    model.train(was_training)
    if not math.isfinite(total):
        raise loading.not_finite(model, "The loss", found or [one.origin for one in examples])
    return total / count


def in_process(module: str, out: Path, *arguments: object) -> dict[str, Any]:
    """Run `python -m MODULE ARGUMENTS OUT` in a new process; what it wrote to OUT, else its "problem"."""
    # Not one of several processes any more, where torchrun started this one.
    left_out = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE"}
    plain = {key: value for key, value in os.environ.items() if key not in left_out}
    # -P: a file torch.py in the folder where the user stands is not to be imported.
    command = [sys.executable, "-P", "-m", module, *map(str, arguments), str(out)]
    done = subprocess.run(command, capture_output=True, errors="replace", env=plain)
    found = files.read_json(out) if out.is_file() else {}
    if found.keys() - {"problem"}:
        return found
    problem = found.get("problem") or done.stderr.strip().rpartition("\n")[2]
    if not problem or done.returncode < 0:  # below 0: the signal that killed it
        problem = f"it ended with code {done.returncode}, most likely for want of memory"
    return {"problem": problem}


def in_a_new_process(folder: Path) -> str:
    """Verify the run in `folder` in a new process, which opens it as a user will; returns the proof in words.

    Raises:
        UserError: the proof fails, or the process was ended, most likely for want of memory.
    """
    with files.scratch(folder) as work:
        found = in_process(__name__, work / PROOF, folder)
    if "proof" in found:
        return str(found["proof"])
    raise UserError(
        f"{folder}: the adapter was saved, but a new process could not verify it, so the run is not "
        f"finished: {found['problem']:.2000}\nOnce that is fixed, {how_to_continue(folder)}"
    )


def main(run: str, out: str) -> None:
    """What the new process does: verify `run`, and write the proof or the problem to the file `out`."""
    try:
        result = {"proof": verify(run)}
    except Exception as error:
        problem = str(error) if isinstance(error, UserError) else shortage(error)
        if not problem:
            raise
        result = {"problem": problem}
    files.write_text(Path(out), json.dumps(result))


def verify(name: str) -> str:
    """Check that the adapter of the run `name` is what its training ended with; returns the proof in words.

    Its data may be gone or changed: then all but the loss is checked, and a notice says why.

    Raises:
        UserError: it is not, or the run cannot be opened.
    """
    target = opening.open_target(name, [])
    settings = target.config
    expected = read_record(Path(name) / PROOF, "sha256", "loss")
    wanted = expected["loss"]
    examples: list[Example] = []
    try:
        tables, notices = splits.read_splits(settings.dataset, settings.training.seed)
        table = tables.get(wanted["split"])
        if table and table.fingerprint == wanted["data"]:
            window = loading.window(target.base.model.config)
            split = dataset.encode(
                table, target.renderer, settings.dataset, wanted["split"], window
            )
            examples = split.examples[: wanted["rows"]]
    except UserError as error:
        notices = [str(error)]
    for notice in notices:
        log.warning(notice)
    return examine(name, target, expected, examples)


def examine(
    name: str, target: opening.Target, expected: dict[str, Any], examples: Sequence[Example]
) -> str:
    """Compare the adapter of `target` with what its training expected; returns the proof in words.

    Three things: its tensors are those that were trained, bit for bit; its logits are not the base's;
    its loss on `examples` is the training's (left out without examples).

    Raises:
        UserError: one of them does not hold.
    """
    model = target.with_adapter()
    tensors = lora.state(model)
    if lora.digest(tensors) != expected["sha256"]:
        raise UserError(
            f"{name}: the adapter is not the one that was trained: its tensors have SHA-256 "
            f"{lora.digest(tensors):.12}, and the training ended with {expected['sha256']:.12}. "
            "Restore it from a copy, or train the run again"
        )
    ids = examples[0].ids if examples else target.renderer.encoder.raw("How are you today?").ids
    difference = logits_difference(model, ids[:64])
    if not 0 < difference < math.inf:
        raise UserError(
            f"{name}: with the adapter, the logits differ from the base's by {difference}, so it changes "
            "nothing or too much. Train for more steps, or with another training.learning_rate"
        )
    loss = "the loss was not compared, for its data is gone or was changed"
    if examples:
        loss = compare_losses(name, model, target, expected, examples)
    return (
        f"the saved adapter, opened in a new process: {len(tensors)} tensors as trained, logits differ "
        f"from the base's by up to {difference:.2g}, {loss}"
    )


def logits_difference(model: Any, ids: Sequence[int]) -> float:
    """The largest absolute difference that the adapter makes to the logits on `ids`."""
    import torch

    batch = torch.tensor([list(ids)], device=model.device)
    with torch.no_grad():
        tuned = model(input_ids=batch).logits
        with model.disable_adapter():
            plain = model(input_ids=batch).logits
    return float((tuned.float() - plain.float()).abs().max())


def compare_losses(
    name: str,
    model: Any,
    target: opening.Target,
    expected: dict[str, Any],
    examples: Sequence[Example],
) -> str:
    """The loss here beside the training's, in words.

    Raises:
        UserError: they are further apart than rounding explains.
    """
    loss = mean_loss(model, target.config, examples)
    split, trained = expected["loss"]["split"], expected["loss"]["value"]
    training = target.config.training
    formats = {str(expected.get("dtype")), str(model.dtype).removeprefix("torch.")}
    exact = formats == {"float32"} and not (training.fp16 or training.bf16)
    # An int8 base is opened as a float one, an nf4 base as nf4.
    quantized = expected.get("quantization") == "int8"
    relative, absolute = QUANTIZED if quantized else EXACT if exact else ROUNDED
    if not math.isclose(loss, trained, rel_tol=relative, abs_tol=absolute):
        raise UserError(
            f"{name}: the loss of the saved adapter on the {split} examples is {loss:.6f}, and the "
            f"training's was {trained:.6f}: further apart than rounding explains ({relative:g} relative). "
            "The base, the libraries or the machine compute differently here"
        )
    return f"{split} loss {loss:.4f} ({trained:.4f} in training)"


if __name__ == "__main__":
    main(*sys.argv[1:])
