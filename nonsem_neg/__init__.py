"""Robust Contrastive Learning Using Negative Samples with Diminished Semantics (Ge et al., NeurIPS 2021)."""
