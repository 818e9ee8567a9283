"""What computing costs: operations, bytes, seconds, and how often to save."""
