"""Generation: the engine, its state machine and its members; answers on their way to all ranks."""
