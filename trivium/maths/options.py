"""Tables of the functions that a configuration can name.

Each entry maps a name to ``module:function``. To add an option, write the function and add its
line here: configurations, their reference and their messages read these tables. Nothing in this
file imports torch, because a configuration is checked without it.
"""

from __future__ import annotations

from typing import Literal

ADVANTAGES = {
    "group_mean": "trivium.maths.advantages:group_advantages",
    "leave_one_out": "trivium.maths.advantages:leave_one_out_advantages",
}
"""Outcome advantages, ``f(rewards_N, sizes_G, *, scale) -> [N]``."""

SURROGATES = {
    "clipped": "trivium.maths.objectives:clipped_surrogate",
    "gspo": "trivium.maths.objectives:gspo_surrogate",
    "cispo": "trivium.maths.objectives:cispo_surrogate",
}
"""Policy losses per token,
``f(logprobs_T, old_logprobs_T, advantages_T, lengths_N, *, clip_low, clip_high)
-> SurrogateLoss``."""

KL_ESTIMATORS = {
    "k1": "trivium.maths.kl:k1",
    "k2": "trivium.maths.kl:k2",
    "k3": "trivium.maths.kl:k3",
}
"""KL estimates per token, ``f(logprobs_T, ref_logprobs_T) -> [T]``."""

AGGREGATIONS = {
    "sequence_mean": "trivium.maths.aggregation:sequence_mean",
    "token_mean": "trivium.maths.aggregation:token_mean",
    "fixed_length": "trivium.maths.aggregation:fixed_length",
}
"""Token weights of one optimizer step, ``f(mask_T, lengths_N, max_length) -> [T]``."""

IMPORTANCE_WEIGHTS = {
    "token_truncate": "trivium.maths.objectives:truncated_importance",
    "token_mask": "trivium.maths.objectives:masked_importance",
    "sequence_truncate": "trivium.maths.objectives:truncated_sequence_importance",
    "sequence_mask": "trivium.maths.objectives:masked_sequence_importance",
}
"""Weights per token that correct for the sampler,
``f(logprobs_T, sampler_logprobs_T, lengths_N, *, cap) -> [T]``."""

PREFERENCE_LOSSES = {
    "sigmoid": "trivium.maths.objectives:dpo_loss",
    "ipo": "trivium.maths.objectives:ipo_loss",
    "hinge": "trivium.maths.objectives:hinge_loss",
    "robust": "trivium.maths.objectives:robust_loss",
}
"""Preference losses per pair,
``f(margins_P, *, beta, label_smoothing, target_margin) -> [P]``."""

RewardAggregation = Literal["sum_then_normalize", "normalize_then_sum"]
"""Whether several rewards are summed before or after their normalization in the group."""

Scale = Literal["sample_std", "population_std", "batch_std", "none"]
"""The deviation that divides a centered reward."""
