"""Tasks that need what another agent knows: the relay, built from nothing on a CPU, and notes for language models."""
