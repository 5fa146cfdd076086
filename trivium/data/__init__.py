"""Data loading: rows, prompts, demonstrations, preferences, and token batches."""
