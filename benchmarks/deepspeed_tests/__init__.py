"""How many of DeepSpeed's own unit tests pass with `runtime` in the place of `deepspeed`, on CPUs over Gloo.

    python -m benchmarks.deepspeed_tests CHECKOUT --results tests.jsonl --markdown benchmarks/results/deepspeed-tests.md

CHECKOUT is a folder with DeepSpeed's sources; nothing of them is in this repository. What --results has does not run
again, so a run that was stopped goes on; `--again failed` runs those that failed once more. `--cases N` runs
each test function with at most N of its sets of parameters, `--sample N` at most N tests of each file, spread evenly;
`--files PART` and `--only PART` choose files and tests by their names.

Files: applicable (which files run) · reasons (why a test need not pass) · outcomes · execution · table · shim, which is
on the path of DeepSpeed's tests.
"""
