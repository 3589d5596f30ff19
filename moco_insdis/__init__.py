"""Momentum Contrast (He et al., CVPR 2020) and Instance Discrimination (Wu et al., CVPR 2018), as shipped next to CMC."""
