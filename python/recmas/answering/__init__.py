"""Answering questions: options, a plan that is checked before any model runs, batches, answers."""
