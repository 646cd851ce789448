"""The engine: what one frozen decoder does with a batch of embeddings, in latent space.

It knows decoders, caches and messages; it knows no tokenizers, patterns or files.
"""
