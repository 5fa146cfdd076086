"""Sandbox for untrusted programs: the parent's side (``host``), a supervisor and its children.

The ``supervisor`` runs as a separate process. It and the modules that it imports use only relative
imports and nothing else from Trivium, so that the process loads neither torch nor Trivium.
"""
