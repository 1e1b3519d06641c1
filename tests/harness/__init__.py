"""What tests share: waiting (and every deadline), and processes that play ranks, hubs, runs and terminals."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The checkout."""
