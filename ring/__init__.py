"""Conditional Negative Sampling (Wu, Mosse, Zhuang, Yamins and Goodman, ICLR 2021, arXiv:2010.02037)."""
