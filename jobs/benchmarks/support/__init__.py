"""What benchmarks share: arguments, processes, clocks, models and records."""
