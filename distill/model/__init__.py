"""Student and teacher models: loading, sharding, packed attention, offload and export of weights."""
