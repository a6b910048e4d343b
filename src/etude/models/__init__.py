"""Bases, adapters and devices."""
