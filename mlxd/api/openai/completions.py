"""POST /v1/completions.

It does not know how tokens are sampled or frames framed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import msgspec

from mlxd.api.generation import gather_outputs, stream_answer
from mlxd.api.grammars import constrain_text
from mlxd.api.http import HTTPRequest
from mlxd.api.openai.frames import CompletionFrames, Envelope
from mlxd.api.openai.logprobs import CompletionLogprobs, mean_logprob
from mlxd.api.openai.sampling import plan_sequences, refuse_unsupported
from mlxd.api.openai.schema import CompletionRequest
from mlxd.api.openai.structured import read_structured_output
from mlxd.api.openai.usage import Usage
from mlxd.api.sequences import SequencePlan
from mlxd.api.served_model import ServedModel
from mlxd.api.services import Services
from mlxd.engine.request import RequestOutput
from mlxd.errors import ContextLengthExceeded, InvalidRequestError


async def create_completion(request: HTTPRequest, services: Services) -> None:
    """Continue one or several prompts, whole or as a stream."""
    fields = await services.read(request, CompletionRequest)
    model = services.model
    model.check_name(fields.model)
    refuse_unsupported(fields)
    if fields.echo and fields.logprobs is not None:
        raise InvalidRequestError(
            "echo: not supported together with logprobs", param="echo", code="unsupported_parameter"
        )
    services.engine.check_ready()
    plan = plan_sequences(
        fields,
        services.config,
        model.files,
        model.vocab_size,
        max_tokens=fields.max_tokens,
        num_logprobs=fields.logprobs,
    )
    structured = read_structured_output(fields)
    if structured is not None:
        grammar = await constrain_text(model, structured)
        plan = replace(plan, sampling=msgspec.structs.replace(plan.sampling, grammar=grammar))
    # What the queue cannot take even when it is empty would be refused as overload, again and again.
    max_prompts = min(
        services.config.limits.max_prompts, services.config.scheduler.max_queue // plan.num_sampled
    )
    prompts = await _encode_prompts(fields, model, max_prompts)
    envelope = Envelope(
        id=f"cmpl-{services.new_id()}",
        object="text_completion",
        created=int(services.now()),
        model=model.name,
        system_fingerprint=model.fingerprint,
    )
    echoes = await prompts.texts(model) if fields.echo else [""] * len(prompts.token_ids)
    answer = _Answer(envelope, plan, fields, echoes, model)
    try:
        generation = services.submit(request, envelope.id, plan.sequences(envelope.id, prompts.token_ids))
    except ContextLengthExceeded as error:
        error.param = "prompt"
        raise
    if fields.stream:
        await stream_answer(request, generation, answer.frames())
        return
    outputs = await gather_outputs(generation, len(echoes) * plan.num_sampled)
    await request.respond_json(200, answer.whole(outputs))


@dataclass(frozen=True, slots=True)
class _Prompts:
    """Token ids of each prompt, and the text of those that came as text."""

    token_ids: list[list[int]]
    given_texts: list[str] | None

    async def texts(self, model: ServedModel) -> list[str]:
        if self.given_texts is not None:
            return self.given_texts
        return [await model.decode(ids, skip_special_tokens=True) for ids in self.token_ids]


async def _encode_prompts(fields: CompletionRequest, model: ServedModel, max_prompts: int) -> _Prompts:
    """A string, strings, token ids, or lists of token ids.

    Raises:
        InvalidRequestError: a mixture of these, too many or none, an empty one, or ids out of range.
    """
    given = fields.prompt
    texts: list[str] | None = None
    if isinstance(given, str):
        texts = [given]
    elif not given:
        raise _invalid("at least one is needed")
    elif all(isinstance(item, str) for item in given):
        texts = cast("list[str]", given)
    elif all(isinstance(item, int) for item in given):
        token_ids = [cast("list[int]", given)]
    elif all(isinstance(item, list) for item in given):
        token_ids = cast("list[list[int]]", given)
    else:
        raise _invalid("expected a string, strings, token ids or lists of token ids, not a mixture")
    num_prompts = len(token_ids if texts is None else texts)
    if num_prompts > max_prompts:
        raise _invalid(f"at most {max_prompts}, got {num_prompts}")
    if texts is not None:
        token_ids = await model.encode(texts, add_special_tokens=fields.add_special_tokens is not False)
    for ids in token_ids:
        if not ids:
            raise _invalid("an empty prompt has no tokens to continue")
        if min(ids) < 0 or max(ids) >= model.vocab_size:
            raise _invalid(f"token ids are from 0 to {model.vocab_size - 1}")
    return _Prompts(token_ids, texts)


def _invalid(problem: str) -> InvalidRequestError:
    return InvalidRequestError(f"prompt: {problem}", param="prompt")


@dataclass(frozen=True, slots=True)
class _Answer:
    """How one request's sequences become its answer."""

    envelope: Envelope
    plan: SequencePlan
    fields: CompletionRequest
    echoes: list[str]
    """one a prompt"""
    model: ServedModel

    def frames(self) -> CompletionFrames:
        """Choice p * n + i is the i-th sequence of prompt p, as at OpenAI."""
        num_choices = self.plan.num_choices
        echoes = [echo for echo in self.echoes for _ in range(num_choices)]
        options = self.fields.stream_options
        return CompletionFrames(
            self.envelope,
            num_choices,
            len(echoes),
            include_usage=bool(options and options.include_usage),
            echoes=echoes,
            logprobs=None if self.fields.logprobs is None else [self._logprobs() for _ in echoes],
        )

    def whole(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        plan = self.plan
        usage = Usage(plan.num_sampled)
        for output in outputs:
            usage.add(output)
        choices: list[dict[str, Any]] = []
        for i, echo in enumerate(self.echoes):
            candidates = outputs[i * plan.num_sampled : (i + 1) * plan.num_sampled]
            if plan.num_sampled > plan.num_choices:
                candidates = sorted(candidates, key=mean_logprob, reverse=True)[: plan.num_choices]
            choices += [self._choice(len(choices) + k, echo, output) for k, output in enumerate(candidates)]
        return {**self.envelope.fields(), "choices": choices, "usage": usage.to_json()}

    def _choice(self, index: int, echo: str, output: RequestOutput) -> dict[str, Any]:
        return {
            "index": index,
            "text": echo + output.text,
            "logprobs": None if self.fields.logprobs is None else self._logprobs().add(output),
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        }

    def _logprobs(self) -> CompletionLogprobs:
        return CompletionLogprobs(
            self.model.tokenizer,
            self.fields.logprobs or 0,
            skip_special_tokens=self.plan.skip_special_tokens,
        )
