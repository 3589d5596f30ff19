"""Conditional Negative Sampling (Wu et al., ICLR 2021, arXiv:2010.02037)."""
