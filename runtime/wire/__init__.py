"""What the processes of a run say to each other: messages, their codec, the sockets, and the run directory's files.
Torch-free."""
