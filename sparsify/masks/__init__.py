"""Keep masks (True = the weight survives): chosen, checked, stored as bits."""
