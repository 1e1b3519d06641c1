"""How well verdicts name what is wrong: real faults in real runs, and simulated traces."""
