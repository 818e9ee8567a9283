"""The importers of Ray: starting or joining it, running work on it, hearing its progress."""
