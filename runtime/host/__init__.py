"""Memory and cores of this host: the ledger of the engine's memory, pinned memory, memory limits, CPU affinity."""
