"""The run directory and what else zerotop keeps on disk: where it is, what it holds, and who may write to it."""
