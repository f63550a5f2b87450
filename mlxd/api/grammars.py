"""What the worker must hold an answer to: a form that was asked for, calls of tools, after the thinking.

It does not know dialects, or how grammars are written.
"""

from __future__ import annotations

from mlxd.api.served_model import ServedModel
from mlxd.chat.format import AnswerFormat
from mlxd.chat.structured import StructuredOutput, compose
from mlxd.errors import InvalidRequestError
from mlxd.step import GrammarSpec


async def constrain_text(model: ServedModel, structured: StructuredOutput) -> GrammarSpec:
    """For a text that is not a conversation's.

    Raises:
        InvalidRequestError: the form cannot be enforced.
    """
    _check_tokenizer(model, structured.param)
    text = compose("@answer", {"answer": structured.grammar})
    await model.grammars.check(text, structured.param)
    return GrammarSpec(text)


async def constrain(
    model: ServedModel, answer: AnswerFormat, structured: StructuredOutput | None
) -> GrammarSpec | None:
    """For an answer in a conversation; None where it may be anything.

    Raises:
        InvalidRequestError: the form cannot be enforced.
    """
    if structured is None:
        return None
    return _after_thinking(model, answer, await constrain_text(model, structured))


def _after_thinking(model: ServedModel, answer: AnswerFormat, spec: GrammarSpec) -> GrammarSpec:
    """The grammar, which holds once the model has thought."""
    reasoning = answer.reasoning
    if reasoning is None:
        return spec
    opening = () if answer.is_open else tuple(model.tokenizer.encode(reasoning.start, False)[:1])
    return GrammarSpec(spec.grammar, (reasoning.end,), opening_token_ids=opening)


def _check_tokenizer(model: ServedModel, param: str) -> None:
    if not (model.files.path / "tokenizer.json").is_file():
        raise InvalidRequestError(
            f"{param}: not supported for this model, which has no tokenizer.json", param=param
        )
