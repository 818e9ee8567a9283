"""A student made to predict what its dense teacher predicts: losses, samples of the teacher."""

from sparsify.distillation.head_loss import Teacher
from sparsify.distillation.head_terms import TokenCounts
from sparsify.distillation.loss import head_distillation_loss
from sparsify.distillation.sampling import draw
from sparsify.distillation.student import DistillStudent

__all__ = ["DistillStudent", "Teacher", "TokenCounts", "draw", "head_distillation_loss"]
