"""Experiment trackers: one file each, and the thread that feeds them."""
