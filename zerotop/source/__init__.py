"""Where the state of a run comes from: a live hub, a hub behind SSH, or a recording. All are folded into a RunState."""
