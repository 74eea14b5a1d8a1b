"""What several tests use: measures of the code, and a world of pairs, models and policies."""
