"""Text embeddings and cross-encoders: model files, pooling, and the loop of the embedding worker.

It does not know requests, texts or prompts: token ids come in, vectors or scores go out.
"""
