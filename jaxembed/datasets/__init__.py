"""Data sets of our own, as tfds builders: importing `jaxembed.datasets.NAME` makes NAME known to tfds."""
