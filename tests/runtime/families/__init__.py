"""One tiny random model of every type that transformers loads as a causal language model, and what holds of it."""
