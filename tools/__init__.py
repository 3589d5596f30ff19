"""Programs that work on finished runs of any paper."""
