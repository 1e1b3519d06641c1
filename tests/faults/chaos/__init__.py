"""Chaos: faults at random times into a run that trains, and after each one proof that nothing is lost.

    make chaos N=20          or: python -m tests.faults.chaos 20 --seed 7 --first 11

Each round is a run with settings of its own, taken from its number; a reference run with the same settings, which
nothing disturbs, says what every step's loss must be, to the last bit.

__main__ (rounds, lines, the count) · settings (what rounds train) · run (a run and its processes) · faults · checks
"""
