"""Sharded checkpoints, written in the background and verified before they are loaded.

A checkpoint's directory gets its final name after all files are written.
"""

from distill.checkpoint.checkpoints import Checkpoints, has_validation
from distill.checkpoint.manifest import CheckpointError, files_of, read_info, read_verified
from distill.checkpoint.recipe_diff import changed_keys
from distill.checkpoint.search import Found
from distill.checkpoint.storage import SHARDS, ShardsReader

__all__ = [
    "SHARDS",
    "CheckpointError",
    "Checkpoints",
    "Found",
    "ShardsReader",
    "changed_keys",
    "files_of",
    "has_validation",
    "read_info",
    "read_verified",
]
