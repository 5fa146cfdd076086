"""``trivium compare``: any methods from one base, at equal budget, measured side by side."""
