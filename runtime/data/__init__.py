"""Turns text into token files and micro-batches, in an order that depends only on the seed and the step number."""


class DataError(ValueError):
    """Training data that cannot be used; the message names the config key and how to fix it."""
