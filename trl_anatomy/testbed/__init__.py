"""A preference set with planted habits, its small model and SAE: known truth for demo, tests and benchmarks."""
