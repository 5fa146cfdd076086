"""Two risks that no curve of a run shows: data left behind, and a reward model out of its depth.

Preference coverage: how near the policy's responses are to the pairs it learned from. The nearest
response of the same prompt's pairs is found by the share of words in common, in order (Ratcliff and
Obershelp's ratio: 1 is the same text); where this falls, the pairs say little of what the policy
now writes.

Reward-model accuracy: how often the learned reward ranks two responses of the policy to one prompt
as quality does, at the base and at the end.
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
from trivium.compare.plan import Job, Plan, for_seed
from trivium.data.prompts import Prompt, PromptsConfig, load_prompts
from trivium.evaluation.statistics import mean_interval
from trivium.models.loading import load_tokenizer
from trivium.models.model_config import ModelConfig
from trivium.models.policy import Policy
from trivium.rewards.reward import RewardConfig
from trivium.rollout.rollouts import Rollouts, roll_out
from trivium.runs.store import read_events, read_metrics
from trivium.training.setup import load_rewards, local_engine

PROMPTS = 64
RESPONSES = 4
Record = dict[str, Any]


def measure(config: CompareConfig, plan: Plan) -> Record:
    """Coverage of methods with pairs, and accuracy of learned rewards; of the first seed."""
    seed = config.seeds[0]
    config = for_seed(config, seed)
    found: Record = {"coverage": [], "reward_model": []}
    for route in plan.routes:
        if route.seed != seed or route.varied is not None or route.method.best_of is not None:
            continue
        jobs = [plan.jobs[name] for name in route.jobs]
        name = {"method": route.method.name}
        if jobs[-1].command == "dpo" and jobs[0].command == "pairs":
            found["coverage"].append(name | _coverage(config, jobs[0], jobs[-1]))
        if jobs[-1].command == "ppo" and any(job.command == "reward-model" for job in jobs):
            found["reward_model"].append(name | _accuracy(config, jobs[-1]))
    return found


def _policies(config: CompareConfig, final: Job) -> dict[str, Policy]:
    model = ModelConfig.model_validate(final.settings["model"])
    tokenizer = load_tokenizer(model)
    temperature = config.sampling.temperature
    trained = model.model_copy(update={"path": str(final.directory / "final")})
    return {
        "base": Policy.load(config.model, tokenizer, temperature=temperature),
        "final": Policy.load(trained, tokenizer, temperature=temperature),
    }


# --- Preference coverage --------------------------------------------------------------------------


def _coverage(config: CompareConfig, pairs: Job, final: Job) -> Record:
    rows = PromptsConfig(path=str(pairs.directory / "rows.jsonl"))
    prompts, known = [], defaultdict(list)
    for prompt in load_prompts(rows, load_tokenizer(config.model)):
        key = json.dumps(prompt.text)
        if key not in known:
            prompts.append(prompt)
        known[key] += [prompt.columns["chosen"], prompt.columns["rejected"]]
    prompts = prompts[:PROMPTS]
    found: Record = {"responses": len(prompts) * RESPONSES}
    for name, policy in _policies(config, final).items():
        engine = local_engine(policy)
        answers = engine.generate(prompts, RESPONSES, config.sampling, seed=1, step=-2)
        nearest = [
            max(similarity(response.text, text) for text in known[json.dumps(prompt.text)])
            for prompt, responses in zip(prompts, answers, strict=True)
            for response in responses
        ]
        found[name] = sum(nearest) / len(nearest)
    return found


def similarity(one: str, other: str) -> float:
    """The share of words that two texts have in common, in order."""
    return SequenceMatcher(None, one.split(), other.split(), autojunk=False).ratio()


# --- Reward-model accuracy ------------------------------------------------------------------------


def _accuracy(config: CompareConfig, final: Job) -> Record:
    """The reward that the method learned from, on responses of the base and of the final policy."""
    updates = [
        {"step": event["step"], "accuracy": event["accuracy"]}
        for event in read_events(final.directory)
        if event["kind"] == "reward_update"
    ]
    began = [RewardConfig.model_validate(r) for r in final.settings["rewards"]]
    ended = began
    if updates:
        ended = [_elsewhere(reward, final.directory / "reward_model") for reward in began]
    answers = {name: _answers(config, p) for name, p in _policies(config, final).items()}
    last = read_metrics(final.directory)[-1]["step"]
    return {
        "points": [
            {"step": 0, **_ranked(config, answers["base"], began)},
            {"step": last, **_ranked(config, answers["final"], ended)},
        ],
        "fixed": _ranked(config, answers["final"], began),
        "updates": updates,
    }


def _elsewhere(reward: RewardConfig, path: Path) -> RewardConfig:
    return reward.model_copy(update={"arguments": {**reward.arguments, "path": str(path)}})


def _answers(config: CompareConfig, policy: Policy) -> Rollouts:
    """Responses to held-out prompts, with their quality."""
    held_out = load_prompts(config.evaluation.data, policy.tokenizer)[:PROMPTS]
    rewards, _ = load_rewards(
        config.evaluation.rewards or config.rewards, held_out, policy.tokenizer
    )
    sampling = config.evaluation.sampling(config.sampling)
    sampling = sampling.model_copy(update={"temperature": config.sampling.temperature})
    engine = local_engine(policy)
    return roll_out(engine, rewards, held_out, RESPONSES, sampling, seed=1, step=-2)


def _ranked(config: CompareConfig, answers: Rollouts, learned: Sequence[RewardConfig]) -> Record:
    """How often the learned reward ranks as quality does; prompts are the observations."""
    tokenizer = load_tokenizer(config.model)
    rewards, _ = load_rewards(learned, answers.prompts, tokenizer)
    repeated: list[Prompt] = [
        p for p, group in zip(answers.prompts, answers.responses, strict=True) for _ in group
    ]
    scores = rewards.score(repeated, answers.flat)
    judged = Rollouts(answers.prompts, answers.responses, scores, {})
    sizes = answers.sizes_G.tolist()
    per_prompt, pairs = [], 0
    for quality, score in zip(
        answers.totals_N.split(sizes), judged.totals_N.split(sizes), strict=True
    ):
        right = ranked_right(quality.tolist(), score.tolist())
        pairs += len(right)
        if right:
            per_prompt.append(sum(right) / len(right))
    if not per_prompt:
        return {"accuracy": None, "low": None, "high": None, "pairs": 0}
    interval = mean_interval(per_prompt, share=False)
    return {"accuracy": interval.mean, "low": interval.low, "high": interval.high, "pairs": pairs}


def ranked_right(quality: Sequence[float], score: Sequence[float]) -> list[float]:
    """For every pair of unequal quality: does the score agree (1), not (0), or not tell (½)?"""
    return [
        0.5 if score[i] == score[j] else float((score[i] > score[j]) == (quality[i] > quality[j]))
        for i, j in combinations(range(len(quality)), 2)
        if quality[i] != quality[j]
    ]
