"""The protocol between the processes of a run: messages, their codec, sockets, and the run directory's files.
Torch-free."""
