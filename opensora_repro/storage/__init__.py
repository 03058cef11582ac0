"""Paths that are addresses of objects: their names here, the objects themselves, and their copies on this node."""
