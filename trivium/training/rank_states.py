"""The state of each process of a run, and what the processes decide together.

Every process has random generators of its own, which a reward function may draw from, and counts
its own FLOPs. Its clock, and the signals that reach it, are its own too, so it must not act on them
alone. With one process, the values are simply its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trivium import distributed
from trivium.models import flops
from trivium.monitoring.metrics import derived
from trivium.runs import rng
from trivium.runs.checkpoint import SavePoint
from trivium.runs.peak_memory import PeakMemory

RankStates = dict[str, list[Any]]
"""The state of each process, by name, as part of a checkpoint."""


def gather(rng_state: dict[str, Any], flops_before_step: float) -> RankStates:
    """Return the random states and FLOPs (now, and at the start of the step) of every process."""
    own = {"rng": rng_state, "flops": (flops.total(), flops_before_step)}
    gathered = distributed.gather("random states", lambda: own)
    return {name: [state[name] for state in gathered] for name in own}


def load(states: Mapping[str, Any], seed: int) -> tuple[dict[str, Any], float]:
    """Load the state of this process; return its random state and the FLOPs before the step.

    If there are more processes than states, the others seed their generators; if there are fewer,
    the first one counts the FLOPs of those that are missing.
    """
    rank, saved, count = distributed.rank(), len(states["rng"]), distributed.size()
    if rank < saved:
        rng.load_state(states["rng"][rank])
    else:
        seed_rank(seed)
    counts = [states["flops"][rank]] if rank < saved else [(0.0, 0.0)]
    if rank == 0:
        counts += states["flops"][count:]
    flops.set_total(sum(total for total, _ in counts))
    return rng.state(), sum(before for _, before in counts)


def seed_rank(seed: int) -> None:
    """Seed this process's random generators; the first process has the run's own seed."""
    rng.seed((seed + distributed.rank() * 1_000_003) % (1 << 63))


def shared_metrics(own: Mapping[str, float], own_flops: float) -> dict[str, float]:
    """Return the metrics of a step, completed, the same on all processes.

    They have the FLOPs of all processes and the times of the first one.
    """
    complete = {**own, "flops": sum(distributed.gather("FLOPs", lambda: own_flops))}
    return distributed.from_rank_0("metrics", lambda: complete | derived(complete))


def largest_peak(own: PeakMemory) -> int:
    """Return the largest peak memory of a process."""
    return max(distributed.gather("peak memory", own.bytes))


def decide(save_point: SavePoint, signal: int | None, due: bool) -> tuple[int | None, bool]:
    """Return a signal that reached some process, and whether the first one finds a save due."""
    decisions = distributed.gather("a save point", lambda: (signal, due), plan=save_point)
    signals = [received for received, _ in decisions if received is not None]
    return (signals[0] if signals else None), decisions[0][1]
