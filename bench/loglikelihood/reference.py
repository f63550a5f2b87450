"""mlx-lm's own log-likelihoods: `python -m bench.loglikelihood.reference FOLDER < pairs.json > answers.json`.

It does not know mlxd's runner, pool or server; of mlxd it takes only the BLAS and the loader, because both
sides must compute with the same weights on the same device. A process of its own, because it holds MLX.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mlxd.config import ModelConfig
from mlxd.worker import platform


def main() -> None:
    """Reads [[context ids, continuation ids], …]; writes [log-likelihood, all likeliest] of each."""
    platform.prepare()
    import mlx.core as mx
    import numpy as np

    from mlxd.worker.loader import open_model

    folder = Path(sys.argv[1])
    model = open_model(folder, ModelConfig(path=str(folder)), "cpu").load(lambda _: None).model
    answers = []
    for context, continuation in json.load(sys.stdin):
        tokens = mx.array([*context, *continuation[:-1]])[None]
        logits = np.array(model(tokens)[0, len(context) - 1 :].astype(mx.float32)).astype(np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        targets = np.array(continuation)
        total = float(logprobs[np.arange(len(targets)), targets].sum())
        answers.append([total, bool((logprobs.argmax(axis=-1) == targets).all())])
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
