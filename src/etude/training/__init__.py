"""The training loop, and all that guards it."""
