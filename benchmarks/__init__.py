"""Benchmarks of jaxdl against what a user would pick instead; `python -m benchmarks.run`."""
