"""Runs as directories: where they lie, who supervises them, and how they ended."""
