"""One small file per verb; each acts at exactly one stage."""
