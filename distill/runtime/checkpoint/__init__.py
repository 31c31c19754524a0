"""Checkpoints: sharded, written in the background beside and renamed when whole, proven before they are read."""

from distill.runtime.checkpoint.checkpoints import Checkpoints, Found, has_validation
from distill.runtime.checkpoint.recipe import changed_keys
from distill.runtime.checkpoint.record import Damaged, files_of, read_info, read_whole
from distill.runtime.checkpoint.shards import SHARDS, ShardsReader

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
