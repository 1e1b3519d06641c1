"""`deepspeed.ops`, as far as training scripts name it: the optimizers in ops/adam.py."""
