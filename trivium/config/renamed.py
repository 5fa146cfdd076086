"""Names of configuration keys, metrics and reward arguments that version 0.2 replaced.

Old names are not translated. They are refused with an error that gives the new name.
"""

from __future__ import annotations

RENAMED_KEYS = {
    "baseline": "advantage",
    "bootstrap_cut_off": "bootstrap_truncated",
    "centre": "center",
    "cut_off": "truncated",
    "drop_cut_off": "mask_truncated",
    "entropy_bonus": "entropy_coef",
    "final_share": "min_lr_ratio",
    "importance_limit": "importance_sampling_cap",
    "judge": "labeler",
    "keep_cut_off": "keep_truncated",
    "lam": "gae_lambda",
    "length_normalised": "length_normalized",
    "passes_at": "pass_threshold",
    "roads": "methods",
    "stop_at_kl": "target_kl",
}
"""Configuration keys: the last part of the old dotted name, and of the new one."""

RENAMED_METRICS = {
    "cut_off": "truncated",
    "length/cut_off": "length/truncated",
}
"""Metrics of training steps and of evaluations."""

RENAMED_ARGUMENTS = {"ended": "finish_reasons"}
"""Parameters of reward functions that Trivium itself passes."""
