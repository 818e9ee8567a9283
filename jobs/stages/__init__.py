"""The stages on the driver: what decides their results, and what they ask of the workers."""
