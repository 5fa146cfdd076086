"""Reward functions: built-in rewards, loading of user functions, and scoring of responses."""
