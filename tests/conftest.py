"""For every test: one thread per torch operation, unless the environment says otherwise.

Two spinning threads on a busy two-core machine make small operations 30 times slower; ranks get their own setting.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
