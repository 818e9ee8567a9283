"""Decoder models: loaded, read block by block, called, watched, masked."""
