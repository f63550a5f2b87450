"""mlxd: an LLM server on MLX for many clients at once."""

__version__ = "0.1.0"
