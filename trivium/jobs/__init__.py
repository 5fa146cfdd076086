"""Jobs: commands with their settings, run in order as processes, once for the same inputs."""
