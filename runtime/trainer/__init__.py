"""The built-in trainer: what `zerotop launch CONFIG` runs on every rank, without a script."""
