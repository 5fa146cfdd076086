"""Held-out evaluation: sampled responses, statistics and confidence intervals."""
