"""Harvest to hypotheses: which concepts separate chosen from rejected, where, and how surely."""
