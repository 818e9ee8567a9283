"""Token rows: made from documents, split, ordered, stored."""
