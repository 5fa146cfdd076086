"""What a run leaves behind, shows while it goes on, and is measured by."""
