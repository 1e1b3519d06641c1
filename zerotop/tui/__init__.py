"""The screen: draws a RunState, and turns keys into commands."""
