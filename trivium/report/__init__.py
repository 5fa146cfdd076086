"""Pages that show what a run's directory says: written to one file, or live on loopback."""
