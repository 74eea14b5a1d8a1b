"""Tokens to features and scores: spans, layers, SAEs, harvests, scorers."""
