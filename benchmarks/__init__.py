"""Speed and memory, each next to a peer in the same run: `python -m benchmarks.NAME`."""
