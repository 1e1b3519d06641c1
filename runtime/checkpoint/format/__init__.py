"""The files of a checkpoint. Readers validate everything, as a checkpoint may come from anybody; writing is atomic.

folder         lists the checkpoints of a folder and completes one by a rename
retention      deletes old ones
manifest       manifest.json: step, shapes, and size and SHA-256 of every file
slices         slices of flattened tensors, as they are written and read
tensors        the schema of tensors.json; index: reads it; legacy: reads the pickle that earlier versions had instead
shard_writer   writes the *.distcp data files; shard_reader: reads them; pickles: the pickles in them and .metadata
plain          small files of plain data and tensors
reader         reads full tensors in one process, for exports
"""
