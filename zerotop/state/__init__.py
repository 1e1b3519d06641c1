"""The state of a run, folded from its messages. Pure: no sockets, no clock, no screen."""
