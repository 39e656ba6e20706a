"""muP for a model that knows nothing of it: sizes (which base), roles, forward factors, start, optimizer, table."""
