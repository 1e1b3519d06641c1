"""How much of the update of offloaded states is hidden behind the next forward, and at what step time.

__main__   the modes beside one another, in one process each: `python -m benchmarks.offload`
modes      the trainers that are compared
tracing    who did what when in one step of ours
drawing    a trace as a picture, and as a file for Perfetto
"""
