"""Contrastive Multiview Coding (Tian, Krishnan & Isola, ECCV 2020)."""
