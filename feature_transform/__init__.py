"""Feature transformation (Zhu et al., ICCV 2021, arXiv:2108.02982)."""
