"""One tiny random model per model type that transformers can load as a causal language model, and what holds of each."""
