"""Why memory ran out: what held it, and which changes of the config would make room."""
