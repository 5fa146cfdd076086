"""Policies, critics, references and reward models: Hugging Face checkpoints over groups."""
