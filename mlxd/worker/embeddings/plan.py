"""`python -m mlxd.worker.embeddings.plan`: the embedding model without its weights, for `mlxd check`.

It does not start a worker, download or convert. Standard input: the configuration as JSON. Standard output:
one JSON object, `{"weights_bytes", "max_model_len", "is_cross_encoder", "dtype"}`, or `{"error": message,
"fatal": whether it cannot work}`; the exit code is 0 for both.
"""

from __future__ import annotations

import sys

import msgspec

from mlxd.config import Config, EmbeddingsConfig
from mlxd.errors import MlxdError, WorkerError
from mlxd.worker import lean_import, platform


def plan(config: EmbeddingsConfig) -> dict[str, object]:
    """The object to print."""
    platform.prepare(config.threads)
    lean_import.install()
    from mlxd.worker.embeddings.backend import Embedder, longest_input, open_embedding_model

    device = platform.detect_device()
    try:
        folder, skeleton = open_embedding_model(config, device, lambda _: None, lambda _: None, offline=True)
        embedder = Embedder.of(skeleton.model, skeleton.config, folder)
    except MlxdError as error:
        return {"error": str(error), "fatal": not isinstance(error, WorkerError)}
    return {
        "weights_bytes": skeleton.weights_bytes(),
        "max_model_len": longest_input(config, folder, embedder.model),
        "is_cross_encoder": embedder.pooler is None,
        "dtype": str(skeleton.dtype).removeprefix("mlx.core."),
    }


def main() -> int:
    config = msgspec.json.decode(sys.stdin.buffer.read(), type=Config)
    print(msgspec.json.encode(plan(config.embeddings)).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
