"""What every node is asked before the work proper: facts, what is wrong with them, and a table."""
