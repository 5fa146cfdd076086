"""Channel between a sandboxed process and the process that started it."""

from __future__ import annotations

import json
import os
from typing import Any


class Channel:
    """Channel to another process: one JSON message per line."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._read = descriptor, b""

    def send(self, message: Any) -> None:
        """Send one message."""
        line = json.dumps(message).encode() + b"\n"
        while line:
            line = line[os.write(self._descriptor, line) :]

    def receive(self) -> Any:
        """Return the next message; raise EOFError if the other side has closed the channel."""
        parts = [self._read]
        while b"\n" not in parts[-1]:
            parts.append(os.read(self._descriptor, 1 << 16))
            if not parts[-1]:
                raise EOFError
        line, _, self._read = b"".join(parts).partition(b"\n")
        return json.loads(line)
