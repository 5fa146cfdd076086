"""Where a path that a user wrote leads, what to say where no system can tell, and the cache.

Whether something must be there, and of what kind, is for whoever reads it.
"""

from __future__ import annotations

import os
from pathlib import Path

from trivium.errors import ConfigurationError


def cache_directory() -> Path:
    """Where files are kept that can be made again: ``$TRIVIUM_CACHE``, or ``trivium`` in
    ``$XDG_CACHE_HOME`` or ``~/.cache``.

    Raises:
        RuntimeError: there is no home directory.
    """
    own, shared = os.environ.get("TRIVIUM_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own or Path(shared or "~/.cache") / "trivium").expanduser()


def looked_up(written: str) -> Path:
    """Return the path, with `~` replaced, which may lead nowhere.

    Raises ConfigurationError for one that cannot even be looked for: of a user who is not known
    here, too long, or behind a directory that may not be entered.
    """
    try:
        path = Path(written).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "there is no such home directory"
        raise ConfigurationError(f"{written}: cannot be looked up: {reason}; check it") from None
    return path
