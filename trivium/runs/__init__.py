"""Run directories: their files, checkpoints, locks, budgets and signals."""
