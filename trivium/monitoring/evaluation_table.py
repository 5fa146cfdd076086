"""The table of what evaluations log: see ``monitoring.metrics``."""

from __future__ import annotations

from trivium.monitoring.metric import Metric

EVALUATION = (
    Metric(
        "greedy",
        "held-out reward, greedy",
        "",
        "Quality",
        "Mean reward of the most probable response to each held-out prompt.",
    ),
    Metric(
        "sampled",
        "held-out reward, sampled",
        "",
        "Quality",
        "Mean reward of sampled responses to the held-out prompts.",
    ),
    Metric(
        "win_rate",
        "win rate against the base",
        "share",
        "Win rate",
        "How often a sampled response has a higher reward than the base's to the same prompt; "
        "ties count half, so 0.5 is no difference. The base is the run's first evaluation.",
    ),
    Metric(
        "pass_at",
        "pass@k",
        "share",
        "Pass at k",
        "The chance that at least one of k sampled responses passes: 1 − C(n−c, k)/C(n, k).",
        "Chen et al. 2021, eq. 1",
    ),
    Metric(
        "kl",
        "KL to the reference",
        "nats",
        "Held-out KL",
        "Mean over sampled responses of Σ_t log π(o_t) − log π_ref(o_t).",
        "Rafailov et al. 2023, eq. 3",
    ),
    Metric("length", "length", "tokens", "Held-out length", "Mean length of sampled responses."),
    Metric(
        "truncated",
        "cut off",
        "share",
        "Held-out cut off",
        "Sampled responses that ran into the length limit.",
    ),
    Metric(
        "distinct",
        "distinct words",
        "share",
        "Diversity",
        "Distinct words among a response's words, averaged: 1 where no word repeats.",
        "Li et al. 2016, distinct-n",
    ),
    Metric(
        "repetition",
        "repeated 3-grams",
        "share",
        "Diversity",
        "Word 3-grams of a response that occurred in it before, averaged.",
    ),
    Metric(
        "reference_logprob",
        "log π_ref per token",
        "nats/token",
        "Fluency",
        "Mean log π_ref per token of the sampled responses: fluency that the reward does not see.",
    ),
    Metric(
        "nll",
        "held-out negative log-likelihood",
        "nats/token",
        "Held-out loss",
        "Mean −log π of held-out demonstrations' tokens: where it rises, the model memorizes.",
    ),
    Metric("loss", "held-out loss", "", "Held-out loss", "Held-out loss of a reward model."),
    Metric(
        "accuracy",
        "held-out accuracy",
        "share",
        "Held-out accuracy",
        "Held-out pairs ranked right, or steps classified right, by a reward model.",
    ),
    Metric("n", "observations", "", "", "Prompts, pairs or steps that were measured."),
)
"""The numbers of ``evaluation.jsonl``; ``_low`` and ``_high`` behind a name bound 95 %."""
