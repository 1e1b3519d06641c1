"""What all ranks of a file's tests import, for the server that they are forked from."""

from __future__ import annotations

import contextlib
import importlib
import os

import torch  # noqa: F401

import runtime.engine.initialize  # noqa: F401

with contextlib.suppress(Exception):  # some files only pytest can import; their ranks then do without
    importlib.import_module(os.environ["ZEROTOP_MODULE"])
