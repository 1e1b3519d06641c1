"""Where pictures of the screen go, and what they are called."""

from __future__ import annotations

import os
import re
from datetime import datetime
from pathlib import Path

from zerotop.rundir.paths import picture_folders


def screenshot_path(run: str) -> Path:
    """A new file in the user's folder for pictures or, if that does not exist, for downloads; else in the current
    folder, or in the home directory if that is not writable."""
    stamp = datetime.now().strftime("%Y-%m-%d-%H%M%S")
    return _folder() / f"zerotop-{re.sub(r'[^A-Za-z0-9._-]+', '_', run)}-{stamp}.svg"


def _folder() -> Path:
    for folder in picture_folders():
        if folder.is_dir():
            return folder.absolute()
    here = Path.cwd()
    return here if os.access(here, os.W_OK) else Path.home()
