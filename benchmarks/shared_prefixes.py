"""Measure what completions of all steps of a solution save when they share its key-value cache.

    python benchmarks/shared_prefixes.py MODEL ROWS.jsonl [--solutions 32] [--completions 8]

ROWS has a `prompt` and a `completion` (the solution) in each row. The prefixes of a solution are
sampled from in order, so that each begins the next one and shares its cache, and then in reverse
order, so that each is computed alone. Both give the same tokens.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from trivium.commands.label_steps import COMPLETIONS_STEP, Solution, StepSplitter
from trivium.data.prompts import Prompt
from trivium.hf.model_config import ModelConfig
from trivium.models import flops
from trivium.models.policy import Policy
from trivium.rollout.sampling import Sampling
from trivium.training.setup import local_engine


def solutions(path: Path, splitter: StepSplitter, count: int) -> list[Solution]:
    """Return the first solutions of a file, divided into steps."""
    found = []
    for index, line in enumerate(path.read_text(encoding="utf-8").splitlines()[:count]):
        row = json.loads(line)
        prompt = Prompt(splitter.encoder.prompt(row["prompt"]), row["prompt"], {}, index)
        tokens = splitter.encoder.exchange(row["prompt"], row["completion"]).response
        solution = splitter.solution(prompt, 0, splitter.response(tokens, "eos"))
        if solution is not None:
            found.append(solution)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("rows", type=Path)
    parser.add_argument("--solutions", type=int, default=32)
    parser.add_argument("--completions", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=48)
    given = parser.parse_args()
    policy = Policy.load(ModelConfig(path=given.model))
    engine, sampling = local_engine(policy), Sampling(max_tokens=given.max_tokens)
    found = solutions(given.rows, StepSplitter("\n", policy.tokenizer), given.solutions)
    prefixes = [prefix for solution in found for prefix in solution.prefixes()]
    engine.generate(prefixes[:2], 2, sampling, seed=1, step=COMPLETIONS_STEP)
    tokens = {}
    for name, ordered in (("shared", prefixes), ("alone", prefixes[::-1])):
        start, before = time.process_time(), flops.total()
        groups = engine.generate(
            ordered, given.completions, sampling, seed=0, step=COMPLETIONS_STEP
        )
        seconds, cost = time.process_time() - start, flops.total() - before
        order = groups if name == "shared" else groups[::-1]
        tokens[name] = [[r.tokens for r in group] for group in order]
        once = sum(len(s.prefixes()[-1].tokens) for s in found if s.prefixes())
        read = once if name == "shared" else sum(len(p.tokens) for p in prefixes)
        print(f"{name}: {read:,} prompt tokens, {cost:.3g} FLOPs, {seconds:.1f} processor s")
    same = sum(a == b for a, b in zip(tokens["shared"], tokens["alone"], strict=True))
    sampled = sum(len(t) for group in tokens["shared"] for t in group)
    print(f"{len(found)} solutions, {sampled:,} tokens sampled")
    print(f"{same} of {len(prefixes)} prefixes have the same samples")


if __name__ == "__main__":
    main()
