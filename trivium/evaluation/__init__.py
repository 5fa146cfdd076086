"""Held-out evaluation: sampled responses, statistics and their intervals."""
