"""Compare methods on six problems whose outcome was predicted before, and score the predictions.

    python benchmarks/verdict_study.py                       # all problems, seeds 0, 1 and 2
    python benchmarks/verdict_study.py --only sparse dense --seeds 3 4 5

The problems are the comparisons in recipes/verdicts, on the built-in task. Their data, bases and
preference pairs are written into runs/verdicts/bases first. Finished jobs are kept, so the same
command continues after a stop. The output is the tables of docs/verdicts.md: quality, verdicts with
all seeds and with each seed alone, and predictions.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trivium
from trivium.compare.config import CompareConfig
from trivium.compare.pooling import separate
from trivium.compare.run import compare, write
from trivium.config.base import load_configuration
from trivium.tasks.files import write_base
from trivium.tasks.problems import generate
from trivium.tasks.writer import ErrorRates, Sizes, demonstration_rows, write_files

RECIPES = Path("recipes/verdicts")
BASES = Path("runs/verdicts/bases")
CORRECT = "trivium.tasks.verifier:correct"
LONGER = "recipes/verdicts/rewards.py:longer_is_better"
DEFAULT_RATES = ErrorRates()
SIZES = Sizes(demonstrations=8_000, problems=2_000, heldout=400, labels=1)


@dataclass(frozen=True)
class Base:
    """Data and a base model: how often demonstrations are wrong, and how long problems are."""

    rates: ErrorRates = DEFAULT_RATES
    operations: tuple[int, int] = (2, 2)
    steps: int = 850


@dataclass(frozen=True)
class Problem:
    """A comparison and what was predicted of it.

    Attributes:
        base: name of its base.
        verdict: methods of which one is recommended or which tie; empty: none is recommended.
        better: (A, B): the quality of A is significantly higher than that of B.
    """

    base: str
    verdict: frozenset[str]
    better: tuple[tuple[str, str], ...]


PLAIN, LONG, MAJORITY = "plain", "long", "majority"
MODEL_AND_PPO = "reward model and PPO"
BASE_KINDS = {
    PLAIN: Base(),
    LONG: Base(operations=(3, 4), steps=1_500),
    MAJORITY: Base(rates=ErrorRates(forgets_borrow=0.45)),
}
PROBLEMS = {
    "sparse": Problem(
        PLAIN,
        frozenset({"GRPO"}),
        (("GRPO", "DPO"), ("PPO", "DPO"), ("GRPO", "SFT on the best samples")),
    ),
    "dense": Problem(
        LONG,
        frozenset({"GRPO, process"}),
        (
            ("GRPO, process", "GRPO, outcome"),
            ("PPO, process", "PPO, outcome"),
            ("GRPO, process", "PPO, outcome"),
        ),
    ),
    "fixed-pairs": Problem(
        PLAIN,
        frozenset({"DPO"}),
        (("DPO", MODEL_AND_PPO), ("DPO", "reward model and GRPO")),
    ),
    "length-bias": Problem(
        PLAIN,
        frozenset({"DPO, length-normalized"}),
        (("DPO, length-normalized", MODEL_AND_PPO), ("DPO", MODEL_AND_PPO)),
    ),
    "exploit": Problem(
        PLAIN,
        frozenset({"DPO"}),
        (("DPO", "GRPO"), ("DPO", "PPO"), ("SFT on the best samples", "GRPO")),
    ),
    "bad-sampler": Problem(
        MAJORITY,
        frozenset({"DPO", "SFT on the best samples"}),
        (),
    ),
}


def main() -> None:
    """Run the problems and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PROBLEMS, default=[*PROBLEMS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    results = {}
    for name in options.only:
        for seed in options.seeds:
            prepare(PROBLEMS[name].base, seed)
        results[name] = run(name, options.seeds)
    print("\n".join(tables(results)))


# --- Data, bases and pairs ------------------------------------------------------------------------


def prepare(kind: str, seed: int) -> None:
    """Write the data, the base and the pairs of one kind and seed, unless they are there."""
    directory, base = BASES / f"{kind}-{seed}", BASE_KINDS[kind]
    data, model = directory / "data", directory / "sft" / "final"
    if not model.exists():
        write_files(data, seed, SIZES, base.rates, base.operations)
        problems = generate(2 * seed, SIZES.demonstrations, base.operations)
        write_base(directory / "base", demonstration_rows(problems, seed, base.rates), seed)
        config = {
            "model": {"path": str(directory / "base")},
            "data": {"path": str(data / "demonstrations.jsonl")},
            "steps": base.steps,
            "examples_per_step": 32,
            "optimizer": {
                "learning_rate": 4e-3,
                "schedule": "cosine",
                "warmup_steps": 50,
                "weight_decay": 0.01,
            },
            "run": {"directory": str(directory / "sft"), "seed": seed, "overwrite": True},
        }
        trivium.sft(trivium.SFTConfig.model_validate(config))
    if kind == PLAIN:
        write_pairs(directory, seed, "pairs", CORRECT)
        write_pairs(directory, seed, "longer-pairs", LONGER)


def write_pairs(directory: Path, seed: int, name: str, reward: str) -> None:
    """Sample the fixed preference pairs that a reward judges."""
    output = directory / f"{name}.jsonl"
    if output.exists():
        return
    config = {
        "model": {"path": str(directory / "sft" / "final")},
        "data": {"path": str(directory / "data" / "problems.jsonl"), "limit": 1_000},
        "rewards": [{"function": reward}],
        "sampling": {"max_tokens": 48},
        "samples": 8,
        "pairs_per_prompt": 2,
        "seed": seed,
        "output": str(output),
    }
    trivium.pairs(trivium.PairsConfig.model_validate(config))


# --- Comparisons ----------------------------------------------------------------------------------


def run(name: str, seeds: Sequence[int]) -> dict[str, Any]:
    """Return the result with all seeds, and the verdict of each seed alone."""
    place = RECIPES / f"{name}.yaml"
    config = load_configuration(CompareConfig, place, [f"seeds=[{', '.join(map(str, seeds))}]"])
    result = compare(config)
    write(config.directory, result)
    alone = [compare(config.model_copy(update={"seeds": (seed,)})) for seed in seeds]
    return result | {"alone": [one["verdict"] for one in alone]}


def names_of(verdict: dict[str, Any]) -> frozenset[str]:
    """Return the method that a verdict recommends, or those that it calls tied."""
    return frozenset([verdict["recommended"]] if verdict["recommended"] else verdict["tied"])


def outcome(result: dict[str, Any], higher: str, lower: str) -> str:
    """Return whether the quality of ``higher`` was shown to exceed that of ``lower``."""
    for difference in result["differences"]:
        if set(difference["methods"]) == {higher, lower}:
            sign = 1 if difference["methods"][0] == higher else -1
            if not separate(difference):
                return f"not shown ({100 * sign * difference['mean']:+.1f} points)"
            right = sign * difference["mean"] > 0
            word = "right" if right else "wrong"
            return f"{word} ({100 * sign * difference['mean']:+.1f} points)"
    raise KeyError(f"{higher}, {lower}")


# --- Tables ---------------------------------------------------------------------------------------


def tables(results: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of the tables."""
    yield "| problem | method | greedy | sampled | KL | alarms | time, s |"
    yield "|---|---|---|---|---|---|---|"
    for name, result in results.items():
        base = result["base_quality"]
        yield f"| {name} | *base* | {percent(base['greedy'])} | {percent(base['sampled'])} | | | |"
        for method in sorted(result["methods"], key=lambda m: -m["greedy"]["mean"]):
            runs = method["runs"]
            kl = sum(run["final"]["kl"] or 0.0 for run in runs) / len(runs)
            alarms = sorted({alarm["monitor"] for run in runs for alarm in run["alarms"]})
            seconds = sum(run["spent"]["seconds"] for run in runs) / len(runs)
            yield (
                f"| | {method['name']} | {percent(method['greedy'])} | "
                f"{percent(method['sampled'])} | {kl:.2f} | {', '.join(alarms)} | {seconds:.0f} |"
            )
    yield ""
    yield "| problem | predicted | verdict | each seed alone |"
    yield "|---|---|---|---|"
    for name, result in results.items():
        alone = "; ".join(words(names_of(verdict)) for verdict in result["alone"])
        predicted = words(PROBLEMS[name].verdict)
        yield f"| {name} | {predicted} | {words(names_of(result['verdict']))} | {alone} |"
    yield ""
    yield "| problem | predicted | shown |"
    yield "|---|---|---|"
    for name, result in results.items():
        for higher, lower in PROBLEMS[name].better:
            yield f"| {name} | {higher} > {lower} | {outcome(result, higher, lower)} |"


def percent(quality: dict[str, Any]) -> str:
    """Return a mean and its interval in per cent."""
    low, high = quality["low"], quality["high"]
    return f"{100 * quality['mean']:.1f} % ({100 * low:.1f} – {100 * high:.1f})"


def words(names: frozenset[str]) -> str:
    """Return the methods of a verdict in words."""
    if not names:
        return "none"
    return " = ".join(sorted(names)) if len(names) > 1 else next(iter(names))


if __name__ == "__main__":
    main()
