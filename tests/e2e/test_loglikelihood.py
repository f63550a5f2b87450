"""Scoring given texts, as evaluation harnesses do: the same log-likelihoods as mlx-lm's own.

`python -m bench.loglikelihood` does it for hundreds of items. With lm-eval at hand (no torch needed):
python -m venv DIR; DIR/bin/pip install "lm_eval[api]" transformers
MLXD_LM_EVAL=DIR/bin/python pytest tests/e2e/test_loglikelihood.py
"""

from __future__ import annotations

import os

import pytest

from bench.loglikelihood.items import ask_lm_eval, ask_mlx_lm, ask_server, encode, make_docs, pairs_of
from tests.e2e.sdk import connect
from tests.e2e.test_standing import model_folder

pytestmark = [pytest.mark.model, pytest.mark.slow, pytest.mark.timeout(600)]

LM_EVAL = os.environ.get("MLXD_LM_EVAL", "")
TOLERANCE = 2e-3
"""of a sum of up to eight log-probabilities: both sides compute in float32"""


def test_log_likelihoods_are_mlx_lms(smollm2):
    """Twenty of them, by lm-eval's own requests, and by lm-eval itself where it is at hand."""
    folder = model_folder()
    docs = make_docs(5, seed=1)
    texts = pairs_of(docs)
    pairs = encode(texts, folder)
    theirs = ask_mlx_lm(pairs, folder)
    answers = [ask_server(smollm2.url, pairs)]
    if LM_EVAL:
        found = ask_lm_eval(LM_EVAL, smollm2.url, docs, folder)
        answers.append([found[text] for text in texts])
    for ours in answers:
        assert [total for total, _ in ours] == pytest.approx([total for total, _ in theirs], abs=TOLERANCE)
        assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert max(theirs[:4])[0] == theirs[0][0], "Paris is the capital of France"


def test_a_prompts_logprobs_are_the_same_streamed_and_not(smollm2):
    with connect(smollm2) as client:
        fields = {"model": "default", "prompt": "The capital of France is", "temperature": 0, "max_tokens": 3}
        whole = client.completions.create(**fields, echo=True, logprobs=2, extra_body={"prompt_logprobs": 2})
        stream = client.completions.create(
            **fields, echo=True, logprobs=2, stream=True, extra_body={"prompt_logprobs": 2}
        )
        pieces = [chunk.choices[0] for chunk in stream]
    [choice] = whole.choices
    assert choice.text == "".join(piece.text for piece in pieces)
    for name in ("tokens", "token_logprobs", "text_offset"):
        given = [value for piece in pieces if piece.logprobs for value in getattr(piece.logprobs, name)]
        assert given == getattr(choice.logprobs, name)
    assert [p.prompt_logprobs for p in pieces if hasattr(p, "prompt_logprobs")] == [choice.prompt_logprobs]
    # A token's place in the text is where its text is.
    for token, offset in zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True):
        assert choice.text[offset:].startswith(token)
