"""Prediction of a run's memory from its configuration, before any model is loaded."""
