"""Worked examples on real images that a package ships: one module each, run by seed."""
