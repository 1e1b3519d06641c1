"""The built-in GPT, loading it from an export, and reading weights and names of any model."""
