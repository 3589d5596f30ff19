"""Scripts that prepare data sets. Each can be run again safely and prints the counts it should end with."""
