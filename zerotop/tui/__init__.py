"""The screen: draws a RunState, and turns keys into commands."""

import os

# What a key changes waits for Textual's next frame. Nothing here is animated, so more frames cost nothing else.
os.environ.setdefault("TEXTUAL_FPS", "120")
