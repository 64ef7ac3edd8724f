"""Optimizer, step, reference, checkpoints, journal."""
