"""DeepSpeed's name of LAMB (arXiv 1904.00962), for scripts that import it and may use another optimizer."""

from __future__ import annotations

from typing import Any


class FusedLamb:
    """Not available: making one is an error that says so."""

    def __init__(self, *_given: Any, **_named: Any) -> None:
        raise NotImplementedError(
            "FusedLamb is not available in zerotop: LAMB scales by the norm of each full parameter, and a rank has "
            "flat shards. Use AdamW (runtime.ops.adam.FusedAdam)"
        )
