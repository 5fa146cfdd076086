"""The CPU fast path."""
