"""The page of a comparison."""

from .page import PAGE, render_comparison, write_comparison

__all__ = ["PAGE", "render_comparison", "write_comparison"]
