"""Optimizer states and parameters in host memory: their placement, gradient downloads, updates, parameter uploads."""
