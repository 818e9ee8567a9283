"""A student made to predict what its dense teacher predicts: losses, schedules, samples.

No names here: the options read `distillation.schedule`, and that without torch.
"""
