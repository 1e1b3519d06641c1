"""What a rank and its writer process say to each other.   (torch-free)

rank                                             writer (python -m runtime.checkpoint.saving.writer)
                                    ◀───────────  ("ready",)                    it has met the other ranks' writers
("memory", nbytes) and a descriptor ───────────▶  maps the shared memory
("save", job, places, slots)        ───────────▶  writes, together with the other ranks' writers
                                    ◀───────────  ("copy_piece", index, slot)   requests a piece of a streamed block
("piece_ready", index)              ───────────▶
                                    ◀───────────  ("alive",)                    every ALIVE_S
                                    ◀───────────  ("done", problem, notes)
"""

import signal

ALIVE_S = 2.0
"""Seconds between two heartbeats of a writer."""
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that writers ignore: the rank ends its writer, while batch systems and terminals signal every process."""
PEER_LOST = "another rank's writer process is gone"
"""Error of the other ranks' writers when one is gone: a consequence, not the cause."""
