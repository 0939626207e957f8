"""Training steps on one GPU, side by side with PyTorch: `python -m benchmarks.gpu.run`."""
