"""Etude: fine-tune a small language model with LoRA from one YAML file, and understand every line."""

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from etude.errors import UserError as UserError
    from etude.model import Model as Model
    from etude.model import load as load
    from etude.train_with_config import Run as Run
    from etude.training.reporter import Step as Step

__version__ = "0.1.0"
logging.getLogger(__name__).addHandler(logging.NullHandler())  # notices are printed where asked for
__all__ = ["Model", "Run", "Step", "UserError", "__version__", "load", "train"]

_HOMES = {
    "Model": "etude.model",
    "Run": "etude.train_with_config",
    "Step": "etude.training.reporter",
    "UserError": "etude.errors",
    "load": "etude.model",
}


def __getattr__(name: str) -> Any:
    """The public names, imported when they are first used: `import etude` alone is quick."""
    if name not in _HOMES:
        raise AttributeError(f"module 'etude' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


def train(
    config: "str | Path | None" = None,
    *,
    preset: str | Sequence[str] = (),
    resume: bool | None = None,
    force: bool = False,
    on_step: "Callable[[Step], object] | None" = None,
    **settings: dict[str, Any],
) -> "Run":
    """Fine-tune a model as `etude train` does, and print nothing.

    Args:
        config: a config file; None for the defaults.
        preset: presets to lay over it, by name or as .yml files.
        resume: True to go on with the unfinished run in output.dir, False never to; None if there is one.
        force: go on although settings, data or base changed, or memory is short.
        on_step: called with each step that has ended, as a `Step`.
        **settings: keys by section, over all that: `train(preset="quickstart", lora={"r": 8})`.

    Raises:
        UserError: a mistake that a user can fix, in one sentence; KeyboardInterrupt where a signal came.
    """
    from etude.config.loading import load_config
    from etude.train_with_config import run_training
    from etude.training.reporter import Reporter

    presets = [preset] if isinstance(preset, str) else preset
    made = load_config(config, presets, [settings])
    return run_training(made, Reporter(on_step), resume, force)
