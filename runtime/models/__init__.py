"""Models that the trainer builds itself. `presets` is torch-free; `gpt` is torch."""
