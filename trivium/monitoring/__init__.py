"""What is watched while a run trains: metrics, alarms, progress."""
