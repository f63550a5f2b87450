"""Benchmarks of mlxd, each a module to run with `python -m bench.NAME` from a checkout.

They know the server by its HTTP API and its /proc entry; only `bench.engine` imports MLX.
"""
