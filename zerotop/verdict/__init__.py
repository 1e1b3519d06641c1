"""Verdicts: what is wrong with a run, which ranks cause it, why, and what to do next. Pure functions over RunState."""
