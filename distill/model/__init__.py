"""The models: loading, attention over packed sequences, sharding, the student and its teacher."""
