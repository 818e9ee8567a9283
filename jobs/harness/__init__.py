"""Benchmark tasks of lm-evaluation-harness: found, asked of a model, compared between models."""
