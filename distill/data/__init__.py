"""Datasets, tokenizers, prompts, grading of responses, and the prompts that the teacher reads.

All code in this package runs on the CPU, without communication between ranks.
"""
