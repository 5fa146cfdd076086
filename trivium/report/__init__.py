"""HTML pages of runs and comparisons: written to one file, or served live on loopback."""
