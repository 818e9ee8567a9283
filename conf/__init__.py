"""What a run can be told: typed options and the YAML values that differ from their defaults."""
