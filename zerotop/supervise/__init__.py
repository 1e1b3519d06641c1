"""The detached supervisor: starts and restarts the ranks, stops them, and records how the run ended."""
