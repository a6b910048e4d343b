"""Etude: fine-tune a small language model with LoRA from one YAML file, and understand every line."""

__version__ = "0.1.0"
