"""Results of pairs of runs: the entries of results.json and the table made from them."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, median
from typing import Any

from cases import CASES, Case

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
COLUMNS = (
    "case", "ratio", "low – high", "promised", "Trivium", "TRL", "tokens, Trivium / TRL",
    "over the limit, Trivium / TRL", "Trivium's stages",
)  # fmt: skip


@dataclass(frozen=True)
class Side:
    """Measurements of one run: means over the measured steps.

    Attributes:
        seconds: processor time of a step.
        tokens: response tokens of a step.
        bytes: peak memory above that of the loaded models.
        base_bytes: memory of the loaded models.
        flops: FLOPs of a step, if they are counted.
        possible: operations that matrix products could have done in the same time, by library.
        stages: wall-clock seconds of each stage of a step, if they are measured.
    """

    seconds: float
    tokens: float
    bytes: int
    base_bytes: int
    flops: float
    possible: dict[str, float]
    stages: dict[str, float]

    @classmethod
    def of(cls, warm_up: int, report: dict[str, Any]) -> Side:
        before, stages = report.get("seconds_before", 0.0), report.get("stages", {})
        seconds = [before + measured for measured in report["seconds"][warm_up:]]
        rates = report["rates"][warm_up:]
        return cls(
            seconds=fmean(seconds),
            tokens=fmean(report["tokens"][warm_up:]),
            bytes=report["peak_bytes"],
            base_bytes=report["base_bytes"],
            flops=fmean(report["flops"][warm_up:]) if "flops" in report else 0.0,
            possible={
                name: fmean(s * rate[name] for s, rate in zip(seconds, rates, strict=True))
                for name in (rates[0] if rates else ())
            },
            stages={name: fmean(values[warm_up:]) for name, values in stages.items()},
        )

    def cost(self, case: Case) -> float:
        """Return the compared cost: seconds per token or step, or bytes."""
        if case.memory:
            return self.bytes
        return self.seconds / (self.tokens if case.method == "generation" else 1)


@dataclass(frozen=True)
class Pair:
    """A Trivium run and a TRL run with the same seed."""

    case: Case
    ours: Side
    theirs: Side

    @property
    def ratio(self) -> float:
        """TRL's cost divided by Trivium's."""
        return self.theirs.cost(self.case) / self.ours.cost(self.case)

    def __str__(self) -> str:
        sides = " and ".join(
            f"{size(side.bytes)}" if self.case.memory else f"{side.seconds:.3f} s"
            for side in (self.ours, self.theirs)
        )
        tokens = f"{self.ours.tokens:.0f} and {self.theirs.tokens:.0f} tokens"
        return f"{self.ratio:.2f} ({sides}; {tokens})"


def summary(case: Case, pairs: list[Pair], *, quick: bool) -> dict[str, Any]:
    """Return a case's entry in results.json.

    A limit distance is the measured time divided by the time of the arithmetic alone with the
    faster library; ``_torch`` uses PyTorch's own product. TRL's distance uses the FLOPs that
    Trivium counted, scaled to TRL's number of tokens.
    """
    ratios = [pair.ratio for pair in pairs]
    sides = {"ours": [p.ours for p in pairs], "theirs": [p.theirs for p in pairs]}
    entry: dict[str, Any] = {
        "case": case.name,
        "ratio": median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "minimum": case.minimum,
        "unit": "bytes" if case.memory else "seconds per step",
    }
    for name, runs in sides.items():
        entry[name] = median(run.bytes if case.memory else run.seconds for run in runs)
        entry[f"{name}_tokens"] = median(run.tokens for run in runs)
        entry[f"{name}_tokens_per_second"] = median(run.tokens / run.seconds for run in runs)
        if case.memory:
            entry[f"{name}_models_bytes"] = median(run.base_bytes for run in runs)
    return entry | {
        **distances(pairs),
        "stages": {} if case.memory else shares(sides["ours"]),
        "flops": median(run.flops for run in sides["ours"]),
        "repetitions": len(pairs),
        "quick": quick,
        "task": asdict(case),
        "code": code(),
        **environment(case),
    }


def distances(pairs: list[Pair]) -> dict[str, float | None]:
    """Return each side's distance from the arithmetic limit, and the rates behind the limit."""
    names = "limit_distance", "limit_distance_torch", "their_limit_distance"
    rates = "peak_gflops", "torch_gflops"
    if pairs[0].case.memory:
        return dict.fromkeys((*names, *rates))
    rows = []
    for ours, theirs in ((pair.ours, pair.theirs) for pair in pairs):
        their_flops = ours.flops * theirs.tokens / ours.tokens
        best, torch_only = max(ours.possible.values()), ours.possible["torch"]
        rows.append(
            (
                best / ours.flops,
                torch_only / ours.flops,
                max(theirs.possible.values()) / their_flops,
                best / ours.seconds / 1e9,
                torch_only / ours.seconds / 1e9,
            )
        )
    medians = map(median, zip(*rows, strict=True))
    return dict(zip((*names, *rates), medians, strict=True))


def shares(runs: list[Side]) -> dict[str, float]:
    """Return the share of each of Trivium's stages in their total time."""
    seconds = {name: fmean(run.stages[name] for run in runs) for name in runs[0].stages}
    total = sum(seconds.values())
    return {name.removeprefix("time/"): value / total for name, value in seconds.items()}


def environment(case: Case) -> dict[str, Any]:
    """Return the processor and the versions of the compared libraries."""
    pins = (HERE / f"{peer(case)}.txt").read_text().split()
    return {
        "cpu": processor(),
        "threads": 1,
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "peer": [pin for pin in pins if pin.split("==")[0] in ("torch", "transformers", "trl")],
    }


def peer(case: Case) -> str:
    """Return the TRL version that a case is compared with: the last that has the method."""
    return "trl-1.9" if case.method == "ppo" else "trl-1.16"


def processor() -> str:
    """Return the system's name of this processor."""
    cpus = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in cpus if "model name" in line), "unknown")


@cache
def code() -> str:
    """Return a hash of all measured code and of the code that measures it."""
    workers = [
        HERE / f"{name}.py" for name in ("limit", "meter", "ours", "reward", "theirs", "worlds")
    ]
    return digest(
        *sorted(REPOSITORY.glob("trivium/**/*.py")), *workers, *sorted(HERE.glob("*.txt"))
    )


def digest(*files: Path) -> str:
    """Return a short hash of the files' contents."""
    sha256 = hashlib.sha256()
    for file in files:
        sha256.update(file.read_bytes())
    return sha256.hexdigest()[:12]


def read(path: Path) -> list[dict[str, Any]]:
    """Return the saved results in the order of the cases."""
    results = json.loads(path.read_text()) if path.exists() else []
    order = list(CASES)
    return sorted((r for r in results if r["case"] in CASES), key=lambda r: order.index(r["case"]))


def write(path: Path, entry: dict[str, Any]) -> None:
    """Save a case's entry in place of its previous one, and rewrite the table."""
    others = [r for r in read(path) if r["case"] != entry["case"]]
    path.write_text(json.dumps([*others, entry], indent=1) + "\n")
    path.write_text(json.dumps(read(path), indent=1) + "\n")
    path.with_suffix(".md").write_text(table(read(path)) + "\n")


def table(results: list[dict[str, Any]]) -> str:
    """Return a Markdown table of all results; results of older code are marked."""
    rows = [COLUMNS, ["---"] * len(COLUMNS), *map(cells, results)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def cells(r: dict[str, Any]) -> list[str]:
    """Return a row of the table."""
    memory = r["unit"] == "bytes"
    fast = r["case"].startswith("generation")
    promised = "" if r["minimum"] is None else f"{r['minimum']:g}"
    if promised and r["ratio"] < r["minimum"]:
        promised += " (missed)"
    stages = ", ".join(f"{name} {share:.0%}" for name, share in r["stages"].items())
    limits = [r["limit_distance"], r["their_limit_distance"]]

    def measured(side: str) -> str:
        if memory:
            return size(r[side])
        return f"{r[f'{side}_tokens_per_second']:,.0f} /s" if fast else f"{r[side]:.3f} s"

    return [
        r["case"] + ("" if r["code"] == code() else " (older code)") + (" (quick)" * r["quick"]),
        f"{r['ratio']:.2f}",
        f"{r['ratio_low']:.2f} – {r['ratio_high']:.2f}",
        promised,
        measured("ours"),
        measured("theirs"),
        f"{r['ours_tokens']:,.0f} / {r['theirs_tokens']:,.0f}",
        "" if memory else " / ".join(f"{limit:.1f}" for limit in limits),
        stages,
    ]


def size(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB"
