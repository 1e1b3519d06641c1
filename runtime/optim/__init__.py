"""Optimizers of shards: AdamW by fused kernels, other elementwise optimizers by torch, and the order of updates."""
