"""Memory and cores of this host: the ledger that gives every persistent byte a category, page-locked memory, limits."""
