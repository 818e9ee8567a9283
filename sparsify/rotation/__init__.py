"""Rotations folded into a model's weights that make it easier to prune."""
