"""How many programs a second the code reward scores on this machine.

    python benchmarks/code_reward.py [--responses 512] [--workers N]

Each program is small and right, so that what is measured is the sandbox itself.
"""

from __future__ import annotations

import argparse
import os
import resource
import time

from trivium.rewards.code import code

PROGRAM = """```python
def add(a, b):
    return a + b


if __name__ == "__main__":
    print(add(1, 2))
```"""
TESTS = {
    "input and output, 1 test": [{"input": "", "output": "3"}],
    "input and output, 10 tests": [{"input": "", "output": "3"}] * 10,
    "assert, 1 test": ["assert add(1, 2) == 3"],
    "assert, 3 tests": ["assert add(1, 2) == 3"] * 3,
    "test code with 100 calls": "for n in range(100):\n    assert add(n, 1) == n + 1",
}


def _processor_time() -> float:
    """Return the seconds that this process and those it has waited for have computed."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def main() -> None:
    """Score one batch per kind of test; print how long it took, and its processor time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--responses", type=int, default=512)
    parser.add_argument("--workers", type=int, default=None)
    options = parser.parse_args()
    cores = options.workers or len(os.sched_getaffinity(0))
    print(f"{options.responses} responses, {cores} at once")
    for name, tests in TESTS.items():
        count = options.responses
        started, before = time.perf_counter(), _processor_time()
        scores = code([PROGRAM] * count, [tests] * count, workers=options.workers)
        seconds = time.perf_counter() - started
        assert scores == [1.0] * count, "every program is right"
        each = 1e3 * (_processor_time() - before) / count
        print(f"{name:28} {seconds:6.1f} s {count / seconds:6.0f} a second {each:6.1f} ms each")


if __name__ == "__main__":
    main()
