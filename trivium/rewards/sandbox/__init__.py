"""What runs on the other side of the seal: a supervisor, and the programs that it starts.

These modules are started as a process of their own (``supervisor``), import nothing of Trivium,
and use relative imports only, so that the process loads neither torch nor this project's names.
"""
