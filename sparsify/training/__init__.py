"""Training by hand: checkpoints, health, forecasts, moving masks."""
