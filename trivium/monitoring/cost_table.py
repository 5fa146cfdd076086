"""Metrics of training steps that describe cost: memory, tokens, speed, FLOPs and time."""

from __future__ import annotations

from trivium.monitoring.metric import Metric

COST_METRICS = (
    Metric(
        "memory/splits",
        "split micro-batches",
        "micro-batches",
        "Memory",
        "Number of micro-batches that ran out of memory and were split in half. The metric is "
        "absent if every micro-batch fit.",
    ),
    Metric(
        "tokens/generated",
        "generated tokens",
        "tokens",
        "Tokens",
        "Number of tokens sampled in the step.",
    ),
    Metric(
        "tokens/trained",
        "trained tokens",
        "tokens",
        "Tokens",
        "Number of response tokens with a gradient, counted once per epoch.",
    ),
    Metric(
        "tokens/per_second",
        "response tokens per second",
        "tokens/s",
        "Speed",
        "Trained tokens divided by the time of the whole step.",
    ),
    Metric(
        "tokens/per_second/rollout",
        "generation speed",
        "tokens/s",
        "Speed",
        "Generated tokens divided by the time of sampling.",
    ),
    Metric(
        "tokens/per_second/update",
        "update speed",
        "tokens/s",
        "Speed",
        "Trained tokens divided by the time of the updates.",
    ),
    Metric(
        "flops",
        "model FLOPs",
        "FLOPs",
        "Cost",
        "Floating-point operations of matrix products and attention in the step, over all models.",
        "Kaplan et al. 2020, section 2.1",
    ),
    Metric("time/total", "step", "s", "Time", "Wall-clock time of the step, without evaluation."),
    Metric(
        "time/rollout",
        "rollout",
        "s",
        "Time",
        "Time for sampling responses. In asynchronous runs it is the time spent waiting for the "
        "responses that are not ready.",
    ),
    Metric(
        "time/scoring",
        "scoring",
        "s",
        "Time",
        "Time for reward functions and reward models after sampling ends. Work that rewards with "
        "while_sampling do during sampling is not counted.",
    ),
    Metric(
        "time/logprobs",
        "log-probs",
        "s",
        "Time",
        "Time for forward passes without gradient (π_old, π_ref, critic) and for the advantages.",
    ),
    Metric(
        "time/update",
        "update",
        "s",
        "Time",
        "Time for forward and backward passes and optimizer steps.",
    ),
    Metric(
        "time/reward_update",
        "reward update",
        "s",
        "Time",
        "Time for labeling responses and training the reward model on them.",
        "Shao et al. 2024, algorithm 1",
    ),
    Metric(
        "time_share/rollout",
        "rollout",
        "share",
        "Share of time",
        "time/rollout divided by time/total.",
    ),
    Metric(
        "time_share/scoring",
        "scoring",
        "share",
        "Share of time",
        "time/scoring divided by time/total.",
    ),
    Metric(
        "time_share/logprobs",
        "log-probs",
        "share",
        "Share of time",
        "time/logprobs divided by time/total.",
    ),
    Metric(
        "time_share/update",
        "update",
        "share",
        "Share of time",
        "time/update divided by time/total.",
    ),
    Metric(
        "time_share/reward_update",
        "reward update",
        "share",
        "Share of time",
        "time/reward_update divided by time/total.",
    ),
)
"""Metrics of memory, tokens, speed, FLOPs and time, in display order."""
