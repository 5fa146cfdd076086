"""Names that configurations, metrics and rewards had before version 0.2, and what replaced them.

Nothing is translated: an old name is refused with the new one named, so that a configuration says
what it means.
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
"""Configuration keys, by the last part of their dotted name."""

RENAMED_METRICS = {
    "cut_off": "truncated",
    "length/cut_off": "length/truncated",
}

RENAMED_ARGUMENTS = {"ended": "finish_reasons"}
"""What a reward function may ask for by a parameter's name."""
