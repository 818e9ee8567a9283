"""Scores of a model on rows: perplexity, KL, top-1 agreement."""

from sparsify.evaluation.divergence import forward_kl
from sparsify.evaluation.perplexity import EvalSums, evaluate_rows, log_gap_recovered

__all__ = ["EvalSums", "evaluate_rows", "forward_kl", "log_gap_recovered"]
