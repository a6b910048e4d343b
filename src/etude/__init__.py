"""Etude: fine-tune a small language model with LoRA from one YAML file, and understand every line."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from etude.errors import UserError as UserError
    from etude.model import Model as Model
    from etude.model import load as load

__version__ = "0.1.0"
__all__ = ["Model", "UserError", "__version__", "load"]

_HOMES = {"Model": "etude.model", "UserError": "etude.errors", "load": "etude.model"}


def __getattr__(name: str) -> Any:
    """The public names, imported when they are first used: `import etude` alone is quick."""
    if name not in _HOMES:
        raise AttributeError(f"module 'etude' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
