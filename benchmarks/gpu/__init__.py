"""The paths for a GPU, run by ``python -m benchmarks.gpu``: which kernels run, how exact and how fast they are."""
