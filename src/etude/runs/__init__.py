"""The folder of a run and all that is written there."""
