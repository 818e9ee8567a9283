"""Where and how work runs: Ray, signals, watchdogs. Knows no maths and no config."""
