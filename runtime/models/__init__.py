"""Models that the trainer builds itself. `presets` is torch-free; `gpt` and `exported` (an exported GPT) are torch."""
