"""Student and teacher models: loading, sharding, packed attention, weights for sync and export."""
