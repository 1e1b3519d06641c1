"""`import deepspeed` in a run with --as-deepspeed: zerotop's engine, by the name that accelerate and transformers use.

This folder is on the path of such runs only. Nothing is installed, and a DeepSpeed that is installed stays as it is.
The folder beside this one is what importlib.metadata looks for.
"""

import sys

import runtime
from runtime.deepspeed_paths import answer_to

answer_to(__name__)
sys.modules[__name__] = runtime
