"""Helpers that several test modules share: tiny models, fakes, tables of bad input."""
