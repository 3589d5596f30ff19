"""Debiased Contrastive Learning."""
