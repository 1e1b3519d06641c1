"""What one node is doing, sampled from outside the ranks: GPUs through NVML, the host through psutil."""
