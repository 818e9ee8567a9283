"""Scores of a model on rows: perplexity, KL, top-1 agreement."""
