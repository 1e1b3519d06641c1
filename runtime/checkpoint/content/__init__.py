"""What stands in a checkpoint, taken from a training state and put back into one.

capture      the slices of parameters, masters and optimizer states that each rank writes and reads
buffers      persistent buffers, and which rank's
groups       parameter groups and the LR scheduler
registered   the objects of engine.register_state()
small_files  the manifest's values, common.pt, and the RNG states
describe     the model's config and tokenizer
"""
