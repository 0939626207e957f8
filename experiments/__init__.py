"""Experiments: one module a task, each a page that builds the pieces and calls `fit`."""
