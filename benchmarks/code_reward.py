"""Measure how many programs per second the code reward scores on this machine.

    python benchmarks/code_reward.py [--responses 512] [--workers N]

Each program is short and correct, so the script measures the sandbox itself.
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
    """Return the processor time of this process and its finished children, in seconds."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main() -> None:
    """Score one batch per kind of test and print the elapsed time and the processor time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--responses", type=int, default=512)
    parser.add_argument("--workers", type=int, default=None)
    options = parser.parse_args()
    workers = options.workers or len(os.sched_getaffinity(0))
    print(f"{options.responses} responses, {workers} in parallel")
    for name, tests in TESTS.items():
        count = options.responses
        started, before = time.perf_counter(), _processor_time()
        scores = code([PROGRAM] * count, [tests] * count, workers=options.workers)
        seconds = time.perf_counter() - started
        assert scores == [1.0] * count, "every program is correct"
        rate = count / seconds
        per_response = 1e3 * (_processor_time() - before) / count
        print(f"{name:28} {seconds:6.1f} s {rate:6.0f} per second {per_response:6.1f} ms each")


if __name__ == "__main__":
    main()
