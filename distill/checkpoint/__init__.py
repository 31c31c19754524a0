"""Checkpoints: sharded, written in the background beside and renamed when whole, proven before they are read."""

from distill.checkpoint.checkpoints import Checkpoints, Found, has_validation
from distill.checkpoint.manifest import Damaged, files_of, read_info, read_whole
from distill.checkpoint.recipe_diff import changed_keys
from distill.checkpoint.storage import SHARDS, ShardsReader

__all__ = [
    "SHARDS",
    "Checkpoints",
    "Damaged",
    "Found",
    "ShardsReader",
    "changed_keys",
    "files_of",
    "has_validation",
    "read_info",
    "read_whole",
]
