"""Where pictures of the screen go, and what they are called."""

from __future__ import annotations

import os
import re
from datetime import datetime
from pathlib import Path


def screenshot_path(run: str) -> Path:
    """A new file in the first folder that exists of $XDG_PICTURES_DIR, ~/Pictures and ~/Downloads; else in the current
    folder, or at home where that can't be written to.
    """
    stamp = datetime.now().strftime("%Y-%m-%d-%H%M%S")
    return _folder() / f"zerotop-{re.sub(r'[^A-Za-z0-9._-]+', '_', run)}-{stamp}.svg"


def _folder() -> Path:
    home = Path.home()
    given = os.environ.get("XDG_PICTURES_DIR")
    for folder in ((Path(given).expanduser(),) if given else ()) + (home / "Pictures", home / "Downloads"):
        if folder.is_dir():
            return folder.absolute()
    here = Path.cwd()
    return here if os.access(here, os.W_OK) else home
