"""The disk tier of the prefix cache: blocks' keys and values in files that outlive the worker.

It does not know MLX or requests: bytes come in under keys and go out again, verified.

block_file.py is the format of one file, folder.py the directory, tier.py the threads and the messages.
"""
