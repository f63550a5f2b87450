"""mlx-lm's own greedy answers: `python -m tests.e2e.reference FOLDER < prompts.json > answers.json`.

It does not know mlxd's runner, pool or sampler; of mlxd it takes only the BLAS and the loader, because both
sides must compute with the same float32 weights on the same device. A process of its own, so that the
tests' process never holds MLX.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mlxd.config import ModelConfig
from mlxd.worker import platform


def main() -> None:
    """Reads [[prompt token ids, max_tokens], …] and writes the token ids of each answer."""
    platform.prepare()
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    from mlxd.worker.loader import open_model

    folder = Path(sys.argv[1])
    model = open_model(folder, ModelConfig(path=str(folder)), "cpu").load(lambda _: None).model
    eos_token_id = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    end = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id)
    answers = []
    for prompt, max_tokens in json.load(sys.stdin):
        answer = []
        for token, _ in generate_step(mx.array(prompt), model, max_tokens=max_tokens):
            if token in end:
                break
            answer.append(token)
        answers.append(answer)
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
