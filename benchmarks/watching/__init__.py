"""What watching another trainer costs: a loop of plain torch under DistributedDataParallel, with and without its one
line, and the start of a wrapped command beside the bare one."""
