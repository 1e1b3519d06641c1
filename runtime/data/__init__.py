"""Text to token files to micro-batches, in an order that depends on the seed and the step number only."""


class DataError(ValueError):
    """Training data that cannot be used; the message names the config key and the way out."""
