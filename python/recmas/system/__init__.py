"""A loaded system: agents, links and a pattern; the walk through them, prompt assembly, and its folder on disk."""
