"""Speed and memory, each figure a ratio to a named baseline in the same run: `python -m benchmarks`, or `make bench`."""
