"""Bad bytes against a run's sockets: python -m tests.faults.fuzz --help."""
