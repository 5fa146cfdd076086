"""Hugging Face checkpoints: their configuration, files, weights and tokenizers."""
