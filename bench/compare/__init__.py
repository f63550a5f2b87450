"""mlxd beside other servers: the same weights, the same machine, the same requests, one after another.

    python -m bench.compare --model FOLDER --other vllm-mlx=/path/to/its/venv --out bench/results/compare.json

It does not know how a server works inside: each is a command line and a URL.
"""
