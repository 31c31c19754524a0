"""Pack rollouts (sampled responses with prompts) into micro-batches, and assign them to ranks.

All functions are pure.
"""
