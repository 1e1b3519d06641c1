"""Explains why memory ran out: what holds it, and which config changes would free enough."""
