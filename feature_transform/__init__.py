"""Feature transformation (Zhu, Zhao, Liu, Sun and Chen, ICCV 2021, arXiv:2108.02982)."""
