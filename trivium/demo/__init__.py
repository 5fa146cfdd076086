"""``trivium demo``: every method on the built-in task, from a randomly initialized model."""

from trivium.demo.run import run

__all__ = ["run"]
