"""Metrics of training steps that describe learning. ``cost_table`` has memory, speed and time."""

from __future__ import annotations

from trivium.monitoring.metric import Metric

_PPO = "Schulman et al. 2017"
_RLHF = "Ouyang et al. 2022"
_DPO = "Rafailov et al. 2023"
_K = "Schulman 2020, Approximating KL divergence"
_37 = "Huang et al. 2022, The 37 implementation details of PPO"

LEARNING_METRICS = (
    Metric(
        "loss",
        "loss",
        "",
        "Loss",
        "The objective that is minimized, averaged over the step's optimizer steps.",
    ),
    Metric(
        "nll",
        "negative log-likelihood",
        "nats/token",
        "Loss",
        "Mean −log π over the trained tokens of the step's demonstrations.",
    ),
    Metric(
        "pretraining/nll",
        "pretraining-mix negative log-likelihood",
        "nats/token",
        "Loss",
        "Mean −log π over the demonstrations that are mixed into PPO (PPO-ptx).",
        f"{_RLHF}, eq. 2",
    ),
    Metric(
        "accuracy",
        "accuracy before the update",
        "share",
        "Reward model",
        "Share of the step's pairs (or labeled steps) that the reward model ranks (or classifies) "
        "correctly, measured before it trains on them. Of a ranking, the share of its comparisons.",
        f"{_RLHF}, eq. 1",
    ),
    Metric(
        "reward/mean",
        "reward",
        "",
        "Reward",
        "Mean total reward of the step's responses: outcome reward plus the sum of process "
        "rewards.",
    ),
    Metric(
        "reward/std",
        "reward std",
        "",
        "Reward",
        "Standard deviation of the total reward over the step's responses.",
    ),
    Metric(
        "rewards/<reward>/mean",
        "reward: {reward}",
        "",
        "Rewards",
        "Mean of one reward function over the step's responses that it applies to, before its "
        "weight is applied.",
    ),
    Metric(
        "rewards/<reward>/std",
        "std: {reward}",
        "",
        "Rewards",
        "Standard deviation of one reward function over the step's responses that it applies to.",
    ),
    Metric(
        "rewards/<reward>/applied",
        "applied: {reward}",
        "share",
        "Rewards",
        "Share of the step's responses that the reward function applies to; logged where it "
        "returned None for a response.",
    ),
    Metric(
        "rewards/<reward>/fallbacks",
        "fallbacks: {reward}",
        "responses",
        "Rewards",
        "Number of responses for which the reward function failed and the configured fallback "
        "value was used.",
    ),
    Metric(
        "group/equal_rewards",
        "groups of equal rewards",
        "share",
        "Advantage",
        "Share of groups whose responses all have the same reward, or with reward_aggregation: "
        "normalize_then_sum the same of each reward. They have no policy gradient.",
        "Yu et al. 2025 (DAPO), section 3.2",
    ),
    Metric(
        "group/skipped",
        "skipped groups",
        "share",
        "Advantage",
        "Share of groups that skip the forward pass because their gradient is zero: Â = 0 (or "
        "weight 0) on every token, and no KL term. Entropy, ratios, clip fractions and Â are then "
        "measured on the other groups.",
        "Yu et al. 2025 (DAPO), section 3.2",
    ),
    Metric("advantage/mean", "advantage", "", "Advantage", "Mean Â over the trained tokens."),
    Metric(
        "advantage/std",
        "advantage std",
        "",
        "Advantage",
        "Standard deviation of Â over the trained tokens.",
        _PPO,
    ),
    Metric(
        "kl/k1",
        "KL to the reference (k1)",
        "nats/token",
        "KL to the reference",
        "Mean of log π − log π_ref over sampled tokens. The estimator is unbiased and may be "
        "negative.",
        _K,
    ),
    Metric(
        "kl/k3",
        "KL to the reference (k3)",
        "nats/token",
        "KL to the reference",
        "Mean of exp(−l) − 1 + l with l = log π − log π_ref. The estimator is unbiased and never "
        "negative.",
        _K,
    ),
    Metric(
        "kl/response",
        "KL to the reference, per response",
        "nats",
        "KL to the reference",
        "k1 summed over each response and averaged over responses: an estimate of KL(π‖π_ref).",
        _K,
    ),
    Metric(
        "kl/beta",
        "KL coefficient β",
        "",
        "KL to the reference",
        "Weight of the KL penalty in PPO's reward. It changes during the run if adaptive_kl is "
        "set.",
        "Ziegler et al. 2019, section 2.2",
    ),
    Metric(
        "policy/entropy",
        "entropy",
        "nats/token",
        "Policy",
        "Mean entropy of the policy at the sampled tokens, without those of skipped groups. "
        "Exploration ends when it falls to 0.",
        _PPO,
    ),
    Metric(
        "policy/kl_old",
        "KL to π_old (k3)",
        "nats/token",
        "Update",
        "How far the step's updates moved the policy from π_old: the k3 estimate on the sampled "
        "tokens.",
        _K,
    ),
    Metric(
        "policy/kl_old_k1",
        "KL to π_old (k1)",
        "nats/token",
        "Update",
        "Mean of log π_old − log π over the sampled tokens.",
        _K,
    ),
    Metric(
        "policy/ratio_mean",
        "ratio",
        "",
        "Ratio",
        "Mean of ρ = π/π_old over the trained tokens.",
        _PPO,
    ),
    Metric("policy/ratio_min", "minimum ratio", "", "Ratio", "Smallest ρ of the step.", _PPO),
    Metric("policy/ratio_max", "maximum ratio", "", "Ratio", "Largest ρ of the step.", _PPO),
    Metric(
        "policy/clip_low",
        "clipped below 1 − ε",
        "share",
        "Update",
        "Share of tokens whose gradient the surrogate's lower clip removes: ρ < 1 − ε and Â < 0. ρ "
        "is the token's ratio, with gspo its sequence's. With cispo, share of tokens whose weight "
        "is raised to 1 − ε.",
        f"{_37}, detail 8",
    ),
    Metric(
        "policy/clip_high",
        "clipped above 1 + ε",
        "share",
        "Update",
        "Share of tokens whose gradient the surrogate's upper clip removes: ρ > 1 + ε and Â > 0. ρ "
        "is the token's ratio, with gspo its sequence's. With cispo, share of tokens whose weight "
        "is lowered to 1 + ε.",
        f"{_37}, detail 8",
    ),
    Metric(
        "policy/sampler_difference",
        "sampler–trainer difference",
        "nats",
        "Update",
        "Largest |log π(sampler) − log π(trainer)| before the update, over the sampled tokens "
        "that the trainer scored: the first minibatch's, and those that policy/old_scored counts.",
        "Yao et al. 2025, truncated importance sampling",
    ),
    Metric(
        "policy/importance_mean",
        "importance weight",
        "",
        "Importance",
        "Mean importance_sampling weight over the trained tokens. 1 if sampler and trainer agree.",
        "Yao et al. 2025, truncated importance sampling",
    ),
    Metric(
        "policy/importance_capped",
        "capped importance weights",
        "share",
        "Importance",
        "Share of the trained tokens whose weight importance_sampling_cap truncates or masks.",
    ),
    Metric(
        "policy/old_scored",
        "tokens scored for π_old",
        "share",
        "Update",
        "Share of response tokens whose log-probs under π_old needed a separate forward pass. The "
        "first minibatch computes its own. Later minibatches need the pass only if the sampler's "
        "log-probs are outside sampler_tolerance, or if the KL to the reference needs the "
        "trainer's.",
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
        "Mean of the critic's (clipped) squared error over tokens and optimizer steps.",
        _PPO,
    ),
    Metric(
        "value/explained_variance",
        "explained variance",
        "",
        "Critic",
        "1 − Var(Target − V_old)/Var(Target). 1 is a perfect critic; 0 or less is no better than "
        "a constant.",
        _37,
    ),
    Metric(
        "implicit_reward/chosen",
        "implicit reward, chosen",
        "",
        "Implicit reward",
        "Mean of β(log π − log π_ref) over chosen responses.",
        f"{_DPO}, section 4",
    ),
    Metric(
        "implicit_reward/rejected",
        "implicit reward, rejected",
        "",
        "Implicit reward",
        "Mean of β(log π − log π_ref) over rejected responses.",
        f"{_DPO}, section 4",
    ),
    Metric(
        "implicit_reward/margin",
        "margin",
        "",
        "Implicit reward",
        "Mean difference between the implicit rewards of the chosen and the rejected response.",
        f"{_DPO}, eq. 7",
    ),
    Metric(
        "implicit_reward/accuracy",
        "preference accuracy",
        "share",
        "Preference",
        "Share of the step's pairs with a positive margin, measured before the update. A margin of "
        "0 counts one half: the policy starts as its reference, at 0.5.",
        f"{_DPO}, eq. 7",
    ),
    Metric(
        "implicit_reward/gradient_weight",
        "gradient weight",
        "",
        "Preference",
        "Mean of −∂L/∂h / β, the weight of each pair in the gradient of the loss in use: σ(−βh) "
        "with sigmoid. It falls to 0 as the pairs are learned.",
        f"{_DPO}, section 4",
    ),
    Metric(
        "logprobs/chosen",
        "log π(chosen)",
        "nats",
        "Log-probs of pairs",
        "Mean log-prob of the chosen responses. In DPO it often falls while the margin grows.",
        "Pal et al. 2024, Smaug",
    ),
    Metric(
        "logprobs/rejected",
        "log π(rejected)",
        "nats",
        "Log-probs of pairs",
        "Mean log-prob of the rejected responses.",
        _DPO,
    ),
    Metric(
        "pairs/found",
        "pairs",
        "pairs",
        "Preference",
        "Number of preference pairs that the step's responses gave.",
    ),
    Metric("length/mean", "length", "tokens", "Length", "Mean length of the step's responses."),
    Metric("length/min", "minimum", "tokens", "Length", "Length of the step's shortest response."),
    Metric("length/max", "maximum", "tokens", "Length", "Length of the step's longest response."),
    Metric(
        "length/truncated",
        "truncated",
        "share",
        "Truncated",
        "Share of responses that reached the length limit before an end token or stop text.",
    ),
    Metric(
        "length/empty",
        "empty",
        "share",
        "Truncated",
        "Share of responses without any text: their first token ended them.",
    ),
    Metric(
        "gradient_norm",
        "gradient norm",
        "",
        "Optimizer",
        "Global norm of the policy's gradient before clipping, averaged over the step's optimizer "
        "steps.",
        "Pascanu et al. 2013",
    ),
    Metric(
        "weights/changed_share",
        "changed weights",
        "share",
        "Weights",
        "Share of the weights with a gradient that an optimizer step changed, on a sample; with "
        "bfloat16 weights, of their float32 copies. The other updates were lost in rounding. Not "
        "logged with stochastic rounding, where few weights change in each step by intent.",
    ),
    Metric(
        "weights/update_norm",
        "size of the update",
        "",
        "Weights",
        "Norm of the change of all weights in one optimizer step, estimated from a sample.",
    ),
    Metric(
        "weights/relative_update",
        "relative update",
        "",
        "Weights",
        "Norm of the change of the weights over the norm of the weights, per optimizer step. In "
        "bfloat16 a change of less than 1/512 of a weight rounds to nothing.",
    ),
    Metric(
        "learning_rate",
        "learning rate",
        "",
        "Optimizer",
        "Learning rate of the step's last optimizer step.",
    ),
    Metric(
        "optimizer_steps",
        "optimizer steps",
        "steps",
        "Optimizer",
        "Number of optimizer steps in this training step.",
    ),
)
"""Metrics of rewards, advantages, losses and optimization, in display order."""
