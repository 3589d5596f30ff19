"""Prepare data sets. Every script can be run again and prints counts."""
