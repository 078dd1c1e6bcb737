"""Whom the harness compares: our modules, plain PyTorch's, and those of other packages."""
