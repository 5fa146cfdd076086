"""``trivium compare``: any roads from one base, at equal budget, measured side by side."""
