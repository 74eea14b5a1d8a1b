"""Policy to edits of the learning signal."""
