"""Measurements of the layer, the epochs and the grid: python -m benchmarks."""
