"""What a run takes before it starts: what fits, how long, how much, and the cheapest choice."""
