"""Problems, prompts and teacher prefixes; runs on the CPU without communication between ranks."""
