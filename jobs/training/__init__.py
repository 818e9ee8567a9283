"""The recovery's engine: student, teacher, rows, steps, checkpoints and watching over them."""
