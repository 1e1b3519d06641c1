"""Compares two runs by their recordings: curves, speed, memory, config, and a verdict with its noise."""
