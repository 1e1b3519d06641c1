"""The screen: draws a RunState, and turns keys into commands. Imports nothing of a run but its messages."""
