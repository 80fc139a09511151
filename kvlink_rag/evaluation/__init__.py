"""Question sets and answer metrics."""
