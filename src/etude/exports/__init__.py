"""Runs written for other programs, and the proof that what was written is the model that was trained."""
