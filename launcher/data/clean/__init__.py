"""Which rows are fit to train on: filters on a row alone, near duplicates, overlap with benchmarks."""
