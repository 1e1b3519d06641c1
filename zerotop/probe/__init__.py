"""Samples of one node, taken from outside the ranks: GPUs through NVML, the host through psutil."""
