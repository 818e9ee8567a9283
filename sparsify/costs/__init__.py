"""What computing costs: operations, memory, seconds, sizes served, and a run on paper."""
