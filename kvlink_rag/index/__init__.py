"""Documents, their vectors and their chunk caches in one folder."""
