"""Reads recordings: which moments one has, the state of the run at each, what happened when, and its curves."""
