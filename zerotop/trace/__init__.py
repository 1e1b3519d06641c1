"""Timelines of a run as trace files, for Perfetto and chrome://tracing."""
