"""The table of all metrics: see ``runs.metrics``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One logged number.

    Attributes:
        name: as it stands in ``metrics.jsonl``.
        title: what a curve is called.
        unit: of the number; empty for a plain number, "share" for one in [0, 1].
        panel: which curves are drawn together.
        meaning: what it is and what to make of it, in a sentence or two.
        source: where it is defined.
    """

    name: str
    title: str
    unit: str
    panel: str
    meaning: str
    source: str = ""


_PPO = "Schulman et al. 2017"
_RLHF = "Ouyang et al. 2022"
_DPO = "Rafailov et al. 2023"
_GRPO = "Shao et al. 2024"
_K = "Schulman 2020, Approximating KL divergence"
_37 = "Huang et al. 2022, The 37 implementation details of PPO"

TABLE = (
    Metric(
        "loss", "loss", "", "Loss", "The minimised objective, averaged over the step's updates."
    ),
    Metric(
        "nll",
        "negative log-likelihood",
        "nats/token",
        "Loss",
        "Mean −log π of the learned tokens of the step's demonstrations.",
    ),
    Metric(
        "pretraining/nll",
        "pretraining-mix negative log-likelihood",
        "nats/token",
        "Loss",
        "Mean −log π of the demonstrations mixed into PPO (PPO-ptx).",
        f"{_RLHF}, eq. 2",
    ),
    Metric(
        "accuracy",
        "accuracy before the update",
        "share",
        "Reward model",
        "Share of the step's pairs (or labelled steps) that the reward model ranks (or classifies) "
        "right, before it learns from them.",
        f"{_RLHF}, eq. 1",
    ),
    Metric(
        "reward/mean",
        "reward",
        "",
        "Reward",
        "Mean total reward of the step's responses: outcome plus the sum over steps.",
    ),
    Metric(
        "reward/std",
        "reward spread",
        "",
        "Reward",
        "Standard deviation of the total reward over the step's responses.",
    ),
    Metric(
        "rewards/<reward>/mean",
        "reward: {reward}",
        "",
        "Rewards",
        "Mean of one reward function, before its weight.",
    ),
    Metric(
        "rewards/<reward>/std",
        "spread: {reward}",
        "",
        "Rewards",
        "Standard deviation of one reward function over the step's responses.",
    ),
    Metric(
        "rewards/<reward>/fallbacks",
        "fallbacks: {reward}",
        "responses",
        "Rewards",
        "Responses whose reward failed and got the fallback value that the configuration allows.",
    ),
    Metric(
        "group/equal_rewards",
        "groups of equal rewards",
        "share",
        "Advantage",
        "Groups whose responses all got the same reward: they teach nothing.",
        "Yu et al. 2025 (DAPO), section 3.2",
    ),
    Metric(
        "group/skipped",
        "skipped groups",
        "share",
        "Advantage",
        "Groups that no pass was spent on, as they have no gradient: Â = 0 (or no weight) on every "
        "token, and no KL term. What is measured of the updates (entropy, ratios, clipping, Â) is "
        "then of the other responses.",
        "Yu et al. 2025 (DAPO), section 3.2",
    ),
    Metric(
        "advantage/mean", "advantage", "", "Advantage", "Mean Â over the tokens of the updates."
    ),
    Metric(
        "advantage/std",
        "advantage spread",
        "",
        "Advantage",
        "Standard deviation of Â over the tokens of the updates.",
        _PPO,
    ),
    Metric(
        "kl/k1",
        "KL to the reference (k1)",
        "nats/token",
        "KL to the reference",
        "Mean of log π − log π_ref on the policy's own tokens: unbiased, may be negative.",
        _K,
    ),
    Metric(
        "kl/k3",
        "KL to the reference (k3)",
        "nats/token",
        "KL to the reference",
        "Mean of exp(−l) − 1 + l with l = log π − log π_ref: unbiased, never negative.",
        _K,
    ),
    Metric(
        "kl/response",
        "KL to the reference, per response",
        "nats",
        "KL to the reference",
        "k1 summed over a response, averaged over responses: an estimate of KL(π‖π_ref).",
        _K,
    ),
    Metric(
        "kl/beta",
        "KL coefficient β",
        "",
        "KL to the reference",
        "Weight of the KL penalty in PPO's reward; moves if adaptive_kl is on.",
        "Ziegler et al. 2019, section 2.2",
    ),
    Metric(
        "policy/entropy",
        "entropy",
        "nats/token",
        "Policy",
        "Mean entropy of the policy at the tokens it wrote, but for skipped groups'. A fall to 0 "
        "ends exploration.",
        _PPO,
    ),
    Metric(
        "policy/kl_old",
        "KL to π_old (k3)",
        "nats/token",
        "Update",
        "How far the updates moved the policy from the one that sampled: k3 on its tokens.",
        _K,
    ),
    Metric(
        "policy/kl_old_k1",
        "KL to π_old (k1)",
        "nats/token",
        "Update",
        "Mean of log π_old − log π on the sampled tokens.",
        _K,
    ),
    Metric("policy/ratio_mean", "ratio", "", "Ratio", "Mean of ρ = π/π_old over tokens.", _PPO),
    Metric("policy/ratio_min", "smallest ratio", "", "Ratio", "Smallest ρ of the step.", _PPO),
    Metric("policy/ratio_max", "largest ratio", "", "Ratio", "Largest ρ of the step.", _PPO),
    Metric(
        "policy/clip_low",
        "clipped below",
        "share",
        "Update",
        "Tokens with ρ < 1 − ε and Â < 0: clipping removes their gradient.",
        f"{_37}, detail 8",
    ),
    Metric(
        "policy/clip_high",
        "clipped above",
        "share",
        "Update",
        "Tokens with ρ > 1 + ε and Â > 0: clipping removes their gradient.",
        f"{_37}, detail 8",
    ),
    Metric(
        "policy/sampler_difference",
        "sampler−trainer difference",
        "nats",
        "Update",
        "Largest |log π(sampler) − log π(trainer)| before the update, over the sampled tokens that "
        "the trainer scored then: the first update's, and those of policy/old_scored.",
        "Yao et al. 2025, truncated importance sampling",
    ),
    Metric(
        "policy/old_scored",
        "tokens scored for π_old",
        "share",
        "Update",
        "Response tokens whose log-probs under π_old took a pass of their own. The first update "
        "knows its own; others need one only where the sampler is not within sampler_tolerance, or "
        "a KL to the reference asks for the trainer's own.",
    ),
    Metric("value/mean", "value", "", "Critic", "Mean V(s_t) of the critic before the update."),
    Metric(
        "value/target_mean",
        "return target",
        "",
        "Critic",
        "Mean of Target_t = V_old(s_t) + Â_t, the λ-return.",
        "Schulman et al. 2016, GAE",
    ),
    Metric(
        "value/loss",
        "value loss",
        "",
        "Critic",
        "Mean of the critic's (clipped) squared error over tokens and updates.",
        _PPO,
    ),
    Metric(
        "value/explained_variance",
        "explained variance",
        "",
        "Critic",
        "1 − Var(Target − V_old)/Var(Target): 1 is perfect, 0 or less no better than a constant.",
        _37,
    ),
    Metric(
        "implicit_reward/chosen",
        "implicit reward, chosen",
        "",
        "Implicit reward",
        "Mean of β(log π − log π_ref) of chosen responses.",
        f"{_DPO}, section 4",
    ),
    Metric(
        "implicit_reward/rejected",
        "implicit reward, rejected",
        "",
        "Implicit reward",
        "Mean of β(log π − log π_ref) of rejected responses.",
        f"{_DPO}, section 4",
    ),
    Metric(
        "implicit_reward/margin",
        "margin",
        "",
        "Implicit reward",
        "Mean difference of the implicit rewards of chosen and rejected.",
        f"{_DPO}, eq. 7",
    ),
    Metric(
        "implicit_reward/accuracy",
        "preference accuracy",
        "share",
        "Preference",
        "Share of the step's pairs with a positive margin, before the update.",
        f"{_DPO}, eq. 7",
    ),
    Metric(
        "implicit_reward/gradient_weight",
        "gradient weight",
        "share",
        "Preference",
        "Mean of σ(r̂_l − r̂_w): how strongly pairs still pull; falls to 0 as they are learned.",
        f"{_DPO}, section 4",
    ),
    Metric(
        "logprobs/chosen",
        "log π(chosen)",
        "nats",
        "Log-probs of pairs",
        "Mean log-prob of chosen responses. DPO often lets it fall while the margin grows.",
        "Pal et al. 2024, Smaug",
    ),
    Metric(
        "logprobs/rejected",
        "log π(rejected)",
        "nats",
        "Log-probs of pairs",
        "Mean log-prob of rejected responses.",
        _DPO,
    ),
    Metric("pairs/found", "pairs", "pairs", "Preference", "Pairs that the step's samples gave."),
    Metric("length/mean", "length", "tokens", "Length", "Mean response length."),
    Metric("length/min", "shortest", "tokens", "Length", "Shortest response of the step."),
    Metric("length/max", "longest", "tokens", "Length", "Longest response of the step."),
    Metric(
        "length/cut_off",
        "cut off",
        "share",
        "Cut off",
        "Responses that ran into the length limit instead of ending by themselves.",
    ),
    Metric(
        "length/empty",
        "empty",
        "share",
        "Cut off",
        "Responses without any text: they ended at once.",
    ),
    Metric(
        "gradient_norm",
        "gradient norm",
        "",
        "Optimiser",
        "Global norm of the policy's gradient before clipping, averaged over the step's updates.",
        "Pascanu et al. 2013",
    ),
    Metric("learning_rate", "learning rate", "", "Optimiser", "Of the step's last update."),
    Metric("optimizer_steps", "updates", "updates", "Optimiser", "Optimiser steps of this step."),
    Metric(
        "memory/splits",
        "halved micro-batches",
        "micro-batches",
        "Memory",
        "Micro-batches of the step's updates that did not fit the memory and were done in halves; "
        "absent where all fitted.",
    ),
    Metric("tokens/generated", "generated tokens", "tokens", "Tokens", "Tokens sampled this step."),
    Metric(
        "tokens/trained",
        "trained tokens",
        "tokens",
        "Tokens",
        "Response tokens with a gradient, counted once per epoch over them.",
    ),
    Metric(
        "tokens/per_second",
        "response tokens per second",
        "tokens/s",
        "Speed",
        "Trained tokens over the whole step's time.",
    ),
    Metric(
        "tokens/per_second/rollout",
        "generation speed",
        "tokens/s",
        "Speed",
        "Generated tokens over the time of generation.",
    ),
    Metric(
        "tokens/per_second/update",
        "update speed",
        "tokens/s",
        "Speed",
        "Trained tokens over the time of the updates.",
    ),
    Metric(
        "flops",
        "model FLOPs",
        "FLOPs",
        "Cost",
        "Floating-point operations of all models' matrix products and attention in the step.",
        "Kaplan et al. 2020, section 2.1",
    ),
    Metric("time/total", "step", "s", "Time", "Wall-clock of the step, evaluation not included."),
    Metric(
        "time/rollout",
        "rollout",
        "s",
        "Time",
        "Sampling responses; where they were sampled ahead, waiting for those that are left.",
    ),
    Metric(
        "time/scoring",
        "scoring",
        "s",
        "Time",
        "Reward functions and reward models, from the end of sampling on: what rewards with "
        "while_sampling did before costs no time of its own.",
    ),
    Metric(
        "time/logprobs",
        "log-probs",
        "s",
        "Time",
        "Passes without gradient: π_old, π_ref, critic; and advantages from them.",
    ),
    Metric("time/update", "update", "s", "Time", "Forward, backward and optimiser."),
    Metric(
        "time/reward_update",
        "reward update",
        "s",
        "Time",
        "Judging responses and training the reward model further.",
        f"{_GRPO}, algorithm 1",
    ),
    Metric("time_share/rollout", "rollout", "share", "Share of time", "time/rollout of the step."),
    Metric("time_share/scoring", "scoring", "share", "Share of time", "time/scoring of the step."),
    Metric(
        "time_share/logprobs", "log-probs", "share", "Share of time", "time/logprobs of the step."
    ),
    Metric("time_share/update", "update", "share", "Share of time", "time/update of the step."),
    Metric(
        "time_share/reward_update",
        "reward update",
        "share",
        "Share of time",
        "time/reward_update of the step.",
    ),
)

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
        f"{_DPO}, eq. 3",
    ),
    Metric("length", "length", "tokens", "Held-out length", "Mean length of sampled responses."),
    Metric(
        "cut_off",
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
        "Mean −log π of held-out demonstrations' tokens: where it rises, the model memorises.",
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
