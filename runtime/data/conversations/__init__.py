"""Conversations, prompts with completions, and text for fine-tuning: files of rows in, packed micro-batches out.

    sources.py    the files and hub data sets that the config names
    readers.py    files -> chunks.py, rows with their numbers
    formats.py    a row -> a conversation, a prompt with its completion, or text
    template.py   a chat template without transformers, as the tokenizing processes use it
    spans.py      where in the rendered text the assistant's turns begin and end
    encode.py     rows -> tokens and which of them are trained
    worker.py     the process that encodes chunks; build.py starts several and puts their results together
    store.py      tokens of all samples in one folder, memory-mapped
    packing.py    which samples share a sequence
    batches.py    the sequences of every rank and step, as tensors
    stream.py     data in segments, each prepared while the one before it is trained; streaming.py makes batches of them
    report.py     what a person should see of it before the first step
    prepare.py    the config section -> all of the above

The modules up to packing.py import neither torch nor transformers: the tokenizing processes start with them.
"""
