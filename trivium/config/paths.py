"""Paths that a user wrote, and the cache directory.

Whether a path must exist, and as a file or a directory, is checked by the code that reads it.
"""

from __future__ import annotations

import os
from pathlib import Path

from trivium.errors import ConfigurationError


def cache_directory() -> Path:
    """Return the directory of files that can be recomputed.

    The directory is ``$TRIVIUM_CACHE``, or else ``trivium`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.

    Raises:
        RuntimeError: there is no home directory.
    """
    own, xdg = os.environ.get("TRIVIUM_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own or Path(xdg or "~/.cache") / "trivium").expanduser()


def looked_up(written: str) -> Path:
    """Return the path with `~` expanded. The path need not exist.

    Raises:
        ConfigurationError: the path cannot be looked up: its home directory is unknown, it is too
            long, or a directory on it cannot be entered.
    """
    try:
        path = Path(written).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "its home directory is unknown"
        raise ConfigurationError(f"{written}: cannot be looked up: {reason}; check it") from None
    return path
