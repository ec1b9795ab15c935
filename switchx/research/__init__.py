"""Measuring and comparing: what is asked of runs rather than done by them."""
