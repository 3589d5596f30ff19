"""Scripts that prepare data sets. Each can be run again and prints the counts to expect."""
