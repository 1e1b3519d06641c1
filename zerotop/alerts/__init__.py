"""Alerts: rules of the config, checked once a second on the state of the run."""
