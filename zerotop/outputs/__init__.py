"""Where a run's figures go: a process of its own that watches the run as a screen does."""
