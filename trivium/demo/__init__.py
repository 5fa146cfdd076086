"""``trivium demo``: every method from nothing to an aligned model, on the embedded task."""

from trivium.demo.run import run

__all__ = ["run"]
