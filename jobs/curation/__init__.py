"""What makes a corpus better: filters, copies, overlaps, mixes; on numpy and xxhash alone."""
