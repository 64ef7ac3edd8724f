"""Packed batches of completions to losses, gradients and metrics."""
