"""One tiny random model per type that transformers can load as a causal language model, and what holds of each."""
