"""How many of DeepSpeed's own unit tests pass with `runtime` in the place of `deepspeed`, on CPUs over Gloo.

    python -m benchmarks.deepspeed_tests CHECKOUT --json tests.json --markdown benchmarks/results/deepspeed-tests.md

CHECKOUT is a folder with DeepSpeed's sources; nothing of them is in this repository. `--sample N` runs N tests of each
file, spread evenly; `--files PART` and `--only PART` choose files and tests by their names.
"""
