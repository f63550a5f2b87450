"""What the sampler should do, one row at a time in float64, written for reading."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mlxd.step import SamplingParams
from mlxd.worker.randomness import uniforms

Float64s = npt.NDArray[np.float64]


def distribution(logits: Float64s, params: SamplingParams, prompt: list[int], output: list[int]) -> Float64s:
    """The probabilities that a token is drawn from; one-hot where greedy."""
    z = logits.astype(np.float64)
    for token, bias in params.logit_bias.items():
        z[token] += bias
    if len(output) < params.min_tokens:
        z[list(params.stop_token_ids)] = -np.inf
    counts = np.bincount(np.array(output, dtype=int), minlength=len(z))
    seen = counts + np.bincount(np.array(prompt, dtype=int), minlength=len(z)) > 0
    z[seen] = np.where(z[seen] > 0, z[seen] / params.repetition_penalty, z[seen] * params.repetition_penalty)
    z -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
    if params.temperature == 0:
        return np.eye(len(z))[np.argmax(z)]
    z = z / params.temperature
    probabilities = _normalised(np.exp(z - z.max()))
    probabilities[probabilities < params.min_p * probabilities.max()] = 0
    if params.top_k:
        kth = np.sort(probabilities)[::-1][min(params.top_k, len(z)) - 1]
        probabilities[probabilities < kth] = 0
    probabilities = _normalised(probabilities)
    if params.top_p < 1:
        order = np.argsort(-probabilities, kind="stable")
        before = np.cumsum(probabilities[order]) - probabilities[order]
        probabilities[order[before >= params.top_p]] = 0
    return _normalised(probabilities)


def token(probabilities: Float64s, seed: int, position: int) -> int:
    """Inverse CDF in token order with the row's own uniform number."""
    uniform = float(uniforms([seed], np.array([position], dtype=np.int32))[0])
    return int(np.searchsorted(np.cumsum(probabilities), uniform, side="right"))


def _normalised(weights: Float64s) -> Float64s:
    normalised: Float64s = weights / weights.sum()
    return normalised
