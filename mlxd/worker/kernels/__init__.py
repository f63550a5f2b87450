"""Attention kernels of our own, for both kinds of GPU that MLX runs on.

They do not know requests or steps. text/ holds their source, source.py puts it together, tile.py lays the
work out, paged.py is the only part that imports MLX.
"""
