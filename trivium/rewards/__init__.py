"""Rewards: plain functions from responses to numbers, and the built-in ones among them."""
