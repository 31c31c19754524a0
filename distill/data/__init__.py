"""Problems, the prompts made of them, and what the teacher reads: all on the host, without talking between ranks."""
