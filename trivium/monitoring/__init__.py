"""Metrics, alarms and progress of a running job."""
