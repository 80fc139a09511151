"""Chunk caches in a folder: one file each, and a catalog of them."""
