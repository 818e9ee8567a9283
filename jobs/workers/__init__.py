"""The stages on Ray workers: the part that needs torch."""
