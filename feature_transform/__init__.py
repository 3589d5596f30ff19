"""Improving Contrastive Learning by Visualizing Feature Transformation (Zhu et al., ICCV 2021, arXiv:2108.02982)."""
