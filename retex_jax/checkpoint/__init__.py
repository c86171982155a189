"""Checkpoints of unfinished work: one folder a step, written by Orbax, checked by content hashes.

Orbax stores and reshards the arrays, but a flipped bit in their data restores as a wrong value, and
another dtype is cast without a word. So a record is kept beside the arrays, with the SHA-256, shape
and dtype of every leaf and the size and SHA-256 of every file, and `restore` checks all of it. A
step's folder appears under its name only once it is whole:

    <directory>/<step>/state/       one folder a leaf (zarr); Orbax alone can read it too
    <directory>/<step>/record.json  hashes, metadata, and a hash of the record itself

A process killed during `save` leaves a hidden `.<step>.saving` folder, which the next `save`
removes. Every process of a multi-process run makes the same calls; process 0 writes the record. Two
runs must not write to one directory: the caller holds a lock.
"""

from retex_jax.checkpoint.checkpointer import Checkpointer

__all__ = ["Checkpointer"]
