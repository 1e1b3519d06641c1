"""Each case in a process of its own, as the collector's settings are the process's."""

from __future__ import annotations

import subprocess
import sys

import pytest

CASES = {
    "what came while importing is kept, and collecting goes on": """
before = gc.get_freeze_count()
with importing():
    assert not gc.isenabled()
    made = [[] for _ in range(1000)]
assert gc.isenabled() and gc.get_freeze_count() >= before + 1000
""",
    "after a failed import, too": """
try:
    with importing():
        import no_such_module
except ImportError:
    assert gc.isenabled()
else:
    raise AssertionError
""",
    "one who has switched it off finds it so": """
gc.disable()
with importing():
    pass
assert not gc.isenabled()
""",
    "a new cycle is found after as many objects": """
import weakref
class Node: pass
collect_less_often()
keep_all_objects()
node = Node()
node.itself = node
gone = weakref.ref(node)
del node
kept = [[] for _ in range(10_000)]
assert gone() is not None
kept += [[] for _ in range(10_500)]
assert gone() is None
""",
}


@pytest.mark.parametrize("name", CASES)
def test_the_collector(name: str) -> None:
    program = "import gc\nfrom runtime.process.garbage import *\n" + CASES[name]
    subprocess.run([sys.executable, "-c", program], check=True)
