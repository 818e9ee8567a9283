"""A checkpoint to a pruned one, block by block, resumable."""
