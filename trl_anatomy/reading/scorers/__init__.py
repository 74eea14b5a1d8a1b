"""One file per way of scoring a concept."""
