"""The hot paths: plain functions on tensors, one reference each."""
