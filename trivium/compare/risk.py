"""Two risks of distribution shift that the training curves do not show.

Preference coverage: the similarity of the policy's responses to the nearest response in the
training pairs of the same prompt, as the share of words in common, in order (the Ratcliff-Obershelp
ratio; 1 means equal texts). If coverage falls, the pairs say little about the policy's responses.

Reward-model accuracy: the share of response pairs of one prompt that the learned reward ranks like
the quality reward, for the base and for the trained policy.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from difflib import SequenceMatcher
from itertools import combinations
from pathlib import Path
from typing import Any

from trivium.compare.config import CompareConfig
from trivium.compare.plan import Plan, with_seed
from trivium.data.prompt_forms import with_arguments_of
from trivium.data.prompts import Prompt, PromptsConfig, load_prompts
from trivium.hf.loading import load_tokenizer
from trivium.hf.model_config import ModelConfig
from trivium.jobs.job import Job
from trivium.maths.intervals import SHARE, mean_interval
from trivium.models.policy import Policy
from trivium.rewards.reward import RewardConfig
from trivium.rollout.rollouts import Rollouts, roll_out
from trivium.runs.store import read_events, read_metrics
from trivium.training.setup import load_rewards, local_engine

PROMPTS = 64
RESPONSES_PER_PROMPT = 4
Record = dict[str, Any]


def measure(config: CompareConfig, plan: Plan) -> Record:
    """Measure preference coverage and the accuracy of learned rewards, for the first seed."""
    seed = config.seeds[0]
    config = with_seed(config, seed)
    records: Record = {"coverage": [], "reward_model": []}
    for run in plan.runs:
        if run.seed != seed or run.varied is not None or run.method.best_of is not None:
            continue
        jobs = [plan.jobs[name] for name in run.jobs]
        name = {"method": run.method.name}
        if jobs[-1].command == "dpo" and jobs[0].command == "pairs":
            records["coverage"].append(name | _coverage(config, jobs[0], jobs[-1]))
        if jobs[-1].command == "ppo" and any(job.command == "reward-model" for job in jobs):
            records["reward_model"].append(name | _accuracy(config, jobs[-1]))
    return records


def _policies(config: CompareConfig, final: Job) -> dict[str, Policy]:
    model = ModelConfig.model_validate(final.settings["model"])
    tokenizer = load_tokenizer(model)
    temperature = config.sampling.temperature
    trained = model.model_copy(update={"path": str(final.product)})
    return {
        "base": Policy.load(config.model, tokenizer, temperature=temperature),
        "final": Policy.load(trained, tokenizer, temperature=temperature),
    }


# --- Preference coverage --------------------------------------------------------------------------


def _coverage(config: CompareConfig, pairs: Job, final: Job) -> Record:
    rows = PromptsConfig(path=str(pairs.product))
    rows = with_arguments_of(rows, config.data)
    prompts, pair_texts = [], defaultdict(list)
    for prompt in load_prompts(rows, load_tokenizer(config.model)):
        key = json.dumps(prompt.text)
        if key not in pair_texts:
            prompts.append(prompt)
        pair_texts[key] += [prompt.columns["chosen"], prompt.columns["rejected"]]
    prompts = prompts[:PROMPTS]
    record: Record = {"responses": len(prompts) * RESPONSES_PER_PROMPT}
    for name, policy in _policies(config, final).items():
        engine = local_engine(policy)
        groups = engine.generate(prompts, RESPONSES_PER_PROMPT, config.sampling, seed=1, step=-2)
        nearest = [
            max(similarity(response.text, text) for text in pair_texts[json.dumps(prompt.text)])
            for prompt, responses in zip(prompts, groups, strict=True)
            for response in responses
        ]
        record[name] = sum(nearest) / len(nearest)
    return record


def similarity(one: str, other: str) -> float:
    """Return the share of words that two texts have in common, in order."""
    return SequenceMatcher(None, one.split(), other.split(), autojunk=False).ratio()


# --- Reward-model accuracy ------------------------------------------------------------------------


def _accuracy(config: CompareConfig, final: Job) -> Record:
    """Measure the accuracy of the method's learned reward on responses of base and policy."""
    updates = [
        {"step": event["step"], "accuracy": event["accuracy"]}
        for event in read_events(final.directory)
        if event["kind"] == "reward_update"
    ]
    initial = [RewardConfig.model_validate(r) for r in final.settings["rewards"]]
    updated = initial
    if updates:
        updated = [_with_path(reward, final.directory / "reward_model") for reward in initial]
    rollouts = {name: _sample_responses(config, p) for name, p in _policies(config, final).items()}
    last = read_metrics(final.directory)[-1]["step"]
    return {
        "points": [
            {"step": 0, **_ranking_accuracy(config, rollouts["base"], initial)},
            {"step": last, **_ranking_accuracy(config, rollouts["final"], updated)},
        ],
        "without_updates": _ranking_accuracy(config, rollouts["final"], initial),
        "updates": updates,
    }


def _with_path(reward: RewardConfig, path: Path) -> RewardConfig:
    return reward.model_copy(update={"arguments": {**reward.arguments, "path": str(path)}})


def _sample_responses(config: CompareConfig, policy: Policy) -> Rollouts:
    """Sample responses to held-out prompts and score their quality."""
    data = with_arguments_of(config.evaluation.data, config.data)
    held_out = load_prompts(data, policy.tokenizer)[:PROMPTS]
    rewards, _ = load_rewards(
        config.evaluation.rewards or config.rewards, held_out, policy.tokenizer
    )
    sampling = config.evaluation.sampling(config.sampling)
    sampling = sampling.model_copy(update={"temperature": config.sampling.temperature})
    engine = local_engine(policy)
    return roll_out(engine, rewards, held_out, RESPONSES_PER_PROMPT, sampling, seed=1, step=-2)


def _ranking_accuracy(
    config: CompareConfig, rollouts: Rollouts, learned: Sequence[RewardConfig]
) -> Record:
    """Return how often the learned reward ranks pairs like quality, averaged over prompts."""
    tokenizer = load_tokenizer(config.model)
    rewards, _ = load_rewards(learned, rollouts.prompts, tokenizer)
    repeated: list[Prompt] = [
        p for p, group in zip(rollouts.prompts, rollouts.responses, strict=True) for _ in group
    ]
    scores = rewards.score(repeated, rollouts.flat)
    learned_rollouts = Rollouts(rollouts.prompts, rollouts.responses, scores, {})
    sizes = rollouts.sizes_G.tolist()
    per_prompt, pairs = [], 0
    for quality, score in zip(
        rollouts.totals_N.split(sizes), learned_rollouts.totals_N.split(sizes), strict=True
    ):
        agreement = pair_agreement(quality.tolist(), score.tolist())
        pairs += len(agreement)
        if agreement:
            per_prompt.append(sum(agreement) / len(agreement))
    if not per_prompt:
        return {"accuracy": None, "low": None, "high": None, "pairs": 0}
    interval = mean_interval(per_prompt, bounds=SHARE)
    return {"accuracy": interval.mean, "low": interval.low, "high": interval.high, "pairs": pairs}


def pair_agreement(quality: Sequence[float], score: Sequence[float]) -> list[float]:
    """Return 1 (scores agree), 0 (they do not) or ½ (a tie) for every pair of unequal quality."""
    return [
        0.5 if score[i] == score[j] else float((score[i] > score[j]) == (quality[i] > quality[j]))
        for i, j in combinations(range(len(quality)), 2)
        if quality[i] != quality[j]
    ]
