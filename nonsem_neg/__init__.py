"""Robust Contrastive Learning Using Negatives with Diminished Semantics (Ge et al., 2021)."""
