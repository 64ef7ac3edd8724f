"""Ways to compute the same attention: plain XLA, and kernels for GPUs and TPUs."""
