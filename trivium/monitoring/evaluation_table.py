"""Metrics of held-out evaluations."""

from __future__ import annotations

from dataclasses import replace

from trivium.monitoring.metric import Metric

AVERAGED = ("greedy", "sampled", "win_rate", "kl", "length", "nll")
"""Metrics that are also measured with the moving average of the weights, as ``ema/NAME``."""
_OF_WEIGHTS = (
    Metric(
        "greedy",
        "held-out reward, greedy",
        "",
        "Quality",
        "Mean reward of the greedily decoded response to each held-out prompt.",
    ),
    Metric(
        "sampled",
        "held-out reward, sampled",
        "",
        "Quality",
        "Mean reward of the sampled responses to the held-out prompts.",
    ),
    Metric(
        "win_rate",
        "win rate against the base",
        "share",
        "Win rate",
        "Share of comparisons in which a sampled response has a higher reward than the base's "
        "response to the same prompt. A tie counts as half a win, so 0.5 means no difference. The "
        "base is the model at the run's first evaluation.",
    ),
    Metric(
        "pass_at",
        "pass@k",
        "share",
        "Pass at k",
        "Probability that at least one of k sampled responses passes: 1 − C(n−c, k)/C(n, k).",
        "Chen et al. 2021, eq. 1",
    ),
    Metric(
        "kl",
        "KL to the reference",
        "nats",
        "Held-out KL",
        "Σ_t log π(o_t) − log π_ref(o_t), averaged over sampled responses.",
        "Rafailov et al. 2023, eq. 3",
    ),
    Metric(
        "length", "length", "tokens", "Held-out length", "Mean length of the sampled responses."
    ),
    Metric(
        "truncated",
        "truncated",
        "share",
        "Held-out truncated",
        "Share of sampled responses that reached the length limit.",
    ),
    Metric(
        "distinct",
        "distinct words",
        "share",
        "Diversity",
        "Share of a response's words that are distinct, averaged over responses. 1 means that no "
        "word repeats.",
        "Li et al. 2016, distinct-n",
    ),
    Metric(
        "repetition",
        "repeated 3-grams",
        "share",
        "Diversity",
        "Share of a response's word 3-grams that occur earlier in it, averaged over responses.",
    ),
    Metric(
        "reference_logprob",
        "log π_ref per token",
        "nats/token",
        "Fluency",
        "Mean log π_ref per token of the sampled responses: a measure of fluency that does not "
        "depend on the reward.",
    ),
    Metric(
        "nll",
        "held-out negative log-likelihood",
        "nats/token",
        "Held-out loss",
        "Mean −log π over the tokens of held-out demonstrations. If it rises, the model is "
        "overfitting.",
    ),
    Metric(
        "loss", "held-out loss", "", "Held-out loss", "Loss of a reward model on held-out data."
    ),
    Metric(
        "accuracy",
        "held-out accuracy",
        "share",
        "Held-out accuracy",
        "Share of held-out pairs (or labeled steps) that a reward model ranks (or classifies) "
        "correctly. Of a ranking, the share of its comparisons; a ranking is one observation.",
    ),
    Metric(
        "n",
        "observations",
        "",
        "",
        "Number of prompts, pairs, rankings or steps in the evaluation.",
    ),
)
EVALUATION_METRICS = (
    *_OF_WEIGHTS,
    *(
        replace(
            m,
            name=f"ema/{m.name}",
            title=f"{m.title}, EMA",
            meaning=f"{m.name} of the exponential moving average of the weights (ema_decay).",
        )
        for m in _OF_WEIGHTS
        if m.name in AVERAGED
    ),
)
"""The metrics of ``evaluation.jsonl``. ``NAME_low`` and ``NAME_high`` bound a 95 % interval."""
