"""A TMPDIR in which no Unix socket has room."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SHOW = """
import multiprocessing.util, sys
from pathlib import Path
from runtime.process.tempdir import keep_socket_paths_short

def show():
    print(multiprocessing.util.get_temp_dir(), flush=True)

keep_socket_paths_short(Path(sys.argv[1]))
show()
child = multiprocessing.get_context("fork").Process(target=show)
child.start()
child.join()
"""


@pytest.mark.parametrize("long", [False, True])
def test_sockets_of_multiprocessing_get_a_short_folder_only_where_they_need_one(tmp_path: Path, long: bool) -> None:
    temporary, short = tmp_path / ("x" * 90) if long else Path("/tmp"), tmp_path / "s"
    temporary.mkdir(exist_ok=True)
    short.mkdir()
    command = [sys.executable, "-c", SHOW, str(short)]
    done = subprocess.run(
        command, env={**os.environ, "TMPDIR": str(temporary)}, capture_output=True, text=True, check=True
    )
    used = {Path(line).parent for line in done.stdout.split()}
    assert used == {short if long else temporary}
