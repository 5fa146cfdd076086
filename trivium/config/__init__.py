"""Strict configurations: sections, YAML sources, field reference, paths, secrets."""
