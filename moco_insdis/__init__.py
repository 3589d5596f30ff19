"""MoCo (He et al., 2020) and Instance Discrimination (Wu et al., 2018) as published with CMC."""
