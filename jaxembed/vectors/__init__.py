"""Vectors at rest: folders of them, their bytes, search, and linear heads."""
