"""The relay lab: three small agents that can only answer together, built from nothing in minutes on a CPU."""
