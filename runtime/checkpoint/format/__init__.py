"""The files of a checkpoint: reading them believes nothing, writing them is atomic.

folder     which checkpoints there are, the rename that completes one, and which old ones go
manifest   what a checkpoint says of itself; sizes and SHA-256 of its files
tensors    the contents of tensors.json; index: reading it; legacy: the pickle that earlier versions had instead
shards     data files as they are written; stored: as they are read
plain      small files that hold plain data and tensors
reading    whole tensors in one process, for exports
"""
