"""One command that verifies a node: ``python -m scripts.accept``."""
