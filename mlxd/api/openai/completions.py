"""POST /v1/completions.

It does not know how tokens are sampled or frames framed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import msgspec
import orjson

from mlxd.api.event_stream import stream_answer
from mlxd.api.generation import gather_outputs, off_loop
from mlxd.api.grammars import constrain_text
from mlxd.api.http import HTTPRequest
from mlxd.api.openai.frames import CompletionFrames, Envelope
from mlxd.api.openai.logprobs import (
    CompletionLogprobs,
    check_prompt_logprobs,
    joined,
    mean_logprob,
)
from mlxd.api.openai.opening import Opening
from mlxd.api.openai.sampling import plan_sequences, refuse_unsupported
from mlxd.api.openai.schema import CompletionRequest
from mlxd.api.openai.structured import read_structured_output
from mlxd.api.openai.usage import Usage
from mlxd.api.sequences import SequencePlan
from mlxd.api.served_model import INLINE_LENGTH, ServedModel
from mlxd.api.services import Services
from mlxd.api.threads import off_loop_if
from mlxd.engine.prompt_logprobs import PromptLogprobs
from mlxd.engine.request import RequestOutput
from mlxd.errors import ContextLengthExceeded, InvalidRequestError
from mlxd.text.fill_in import FillIn
from mlxd.text.token_ids import in_vocabulary

_MIXTURE = "expected a string, strings, token ids or lists of token ids, not a mixture"


async def create_completion(request: HTTPRequest, services: Services) -> None:
    """Continue one or several prompts, whole or as a stream."""
    fields = await services.read(request, CompletionRequest)
    model = services.model
    model.check_name(fields.model)
    refuse_unsupported(fields)
    if fields.echo and fields.suffix:
        raise InvalidRequestError("echo: a prompt with a suffix cannot be repeated", param="echo")
    services.engine.check_ready()
    plan = plan_sequences(
        fields,
        services.config,
        model.files,
        model.vocab_size,
        num_logprobs=fields.logprobs,
    )
    structured = read_structured_output(fields)
    if structured is not None:
        grammar = await constrain_text(model, structured)
        plan = plan.with_common(sampling=msgspec.structs.replace(plan.common.sampling, grammar=grammar))
    # What the queue cannot take even when it is empty would be refused as overload, again and again.
    max_prompts = min(
        services.config.limits.max_prompts, services.config.scheduler.max_queue // plan.num_sampled
    )
    prompts = await _encode_prompts(fields, model, max_prompts)
    asked = {"logprobs": fields.logprobs if fields.echo else None, "prompt_logprobs": fields.prompt_logprobs}
    plan = plan.with_common(
        prompt_logprobs=check_prompt_logprobs(
            prompts.token_ids, asked, plan.num_choices, services.config.limits.max_prompt_logprobs
        ),
        end_token_ids=prompts.end_token_ids,
    )
    envelope = Envelope(
        id=f"cmpl-{services.new_id()}",
        object="text_completion",
        created=int(services.now()),
        model=model.name,
        system_fingerprint=model.fingerprint,
    )
    echoes = await prompts.texts(model, plan.common.skip_special_tokens) if fields.echo else None
    answer = _Answer(envelope, plan, fields, prompts.token_ids, echoes, model)
    try:
        generation = services.submit(request, envelope.id, plan.sequences(envelope.id, prompts.token_ids))
    except ContextLengthExceeded as error:
        error.param = "prompt"
        if len(prompts.token_ids) == 1:
            raise
        limit = model.max_model_len or 0
        place = next((n for n, ids in enumerate(prompts.token_ids) if len(ids) >= limit), 0)
        raise ContextLengthExceeded(f"prompt[{place}]: {error.message}", param=f"prompt[{place}]") from error
    if fields.stream:
        await stream_answer(request, generation, answer.frames())
        return
    outputs = await gather_outputs(generation, len(prompts.token_ids) * plan.num_sampled)
    body = await off_loop(outputs, lambda: orjson.dumps(answer.whole(outputs)))
    await request.respond(200, body)


@dataclass(frozen=True, slots=True)
class _Prompts:
    """Token ids of each prompt, the text of those that came as text, and what else ends an answer."""

    token_ids: list[list[int]]
    given_texts: list[str] | None
    end_token_ids: tuple[int, ...] = ()

    async def texts(self, model: ServedModel, skip_special_tokens: bool) -> list[str]:
        if self.given_texts is not None:
            return self.given_texts
        return [await model.decode(ids, skip_special_tokens=skip_special_tokens) for ids in self.token_ids]


async def _encode_prompts(fields: CompletionRequest, model: ServedModel, max_prompts: int) -> _Prompts:
    """A string, strings, token ids, or lists of token ids; strings may have a suffix.

    Raises:
        InvalidRequestError: a mixture of these, too many or none, an empty one, or ids out of range; a suffix
            or special tokens where there are no strings; a suffix for a model that cannot fill in.
    """
    given = fields.prompt
    texts: list[str] | None = None
    if isinstance(given, str):
        texts = [given]
    elif not given:
        raise _invalid("at least one is needed")
    elif isinstance(given[0], int):
        token_ids = [cast("list[int]", given)]
    elif len(given) > max_prompts:
        raise _invalid(f"at most {max_prompts}, got {len(given)}")
    elif all(isinstance(item, str) for item in given):
        texts = cast("list[str]", given)
    elif all(isinstance(item, list) for item in given):
        token_ids = cast("list[list[int]]", given)
    else:
        raise _invalid(_MIXTURE)
    if fields.suffix:
        if texts is None:
            raise InvalidRequestError("suffix: only with prompts that are strings", param="suffix")
        return await _encode_fill_ins(texts, fields.suffix, fields.add_special_tokens is not False, model)
    if texts is None and fields.add_special_tokens:
        raise InvalidRequestError(
            "add_special_tokens: token ids are taken as they are", param="add_special_tokens"
        )
    if texts is not None:
        token_ids = await model.encode(texts, add_special_tokens=fields.add_special_tokens is not False)
    for place, ids in enumerate(token_ids):
        param = "prompt" if len(token_ids) == 1 else f"prompt[{place}]"
        if not ids:
            raise _invalid("an empty prompt has no tokens to continue", param)
        try:
            are_known = in_vocabulary(ids, model.vocab_size)
        except TypeError as error:
            raise _invalid(_MIXTURE) from error
        if not are_known:
            raise _invalid(f"token ids are from 0 to {model.vocab_size - 1}", param)
    return _Prompts(token_ids, texts)


async def _encode_fill_ins(
    texts: list[str], suffix: str, add_special_tokens: bool, model: ServedModel
) -> _Prompts:
    fill_in = FillIn.of(model.tokenizer)
    if fill_in is None:
        raise InvalidRequestError(
            "suffix: this model has no tokens for filling in what stands between two texts",
            param="suffix",
            code="unsupported_parameter",
        )

    def encode() -> list[list[int]]:
        return [fill_in.encode(text, suffix, add_special_tokens=add_special_tokens) for text in texts]

    is_long = sum(map(len, texts)) + len(texts) * len(suffix) > INLINE_LENGTH
    return _Prompts(await off_loop_if(is_long, encode), texts, fill_in.end_token_ids)


def _invalid(problem: str, param: str = "prompt") -> InvalidRequestError:
    return InvalidRequestError(f"{param}: {problem}", param=param)


@dataclass(frozen=True, slots=True)
class _Answer:
    """How one request's sequences become its answer."""

    envelope: Envelope
    plan: SequencePlan
    fields: CompletionRequest
    prompts: list[list[int]]
    echoes: list[str] | None
    """one a prompt, where they are to be repeated"""
    model: ServedModel

    def frames(self) -> CompletionFrames:
        """Choice p * n + i is the i-th sequence of prompt p, as at OpenAI."""
        return CompletionFrames(
            self.envelope,
            self.plan.num_choices,
            [
                self._opening(place)
                for place in range(len(self.prompts))
                for _ in range(self.plan.num_choices)
            ],
            self.fields.stream_options,
            awaits_prompt_logprobs=self.plan.common.prompt_logprobs >= 0,
        )

    def whole(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        plan = self.plan
        usage = Usage(plan.num_sampled)
        for output in outputs:
            usage.add(output)
        choices: list[dict[str, Any]] = []
        for place in range(len(self.prompts)):
            candidates = outputs[place * plan.num_sampled : (place + 1) * plan.num_sampled]
            known = candidates[0].prompt_logprobs
            if plan.num_sampled > plan.num_choices:
                candidates = sorted(candidates, key=mean_logprob, reverse=True)[: plan.num_choices]
            choices += [self._choice(len(choices) + k, place, o, known) for k, o in enumerate(candidates)]
        return {**self.envelope.fields(), "choices": choices, "usage": usage.to_json()}

    def _choice(
        self, index: int, place: int, output: RequestOutput, known: PromptLogprobs | None
    ) -> dict[str, Any]:
        opening = self._opening(place)
        choice = {"index": index, **opening.make(known)}
        choice["text"] += output.text
        if opening.logprobs is not None:
            added = opening.logprobs.add(output)
            choice["logprobs"] = joined(choice["logprobs"], added) if choice["logprobs"] else added
        return {**choice, "finish_reason": output.finish_reason, "stop_reason": output.stop_reason}

    def _opening(self, place: int) -> Opening:
        fields, token_ids = self.fields, self.prompts[place]
        logprobs = None
        if fields.logprobs is not None:
            logprobs = CompletionLogprobs(
                self.model.tokenizer,
                fields.logprobs,
                token_ids,
                skip_special_tokens=self.plan.common.skip_special_tokens,
            )
        return Opening(
            token_ids,
            self.model.tokenizer,
            echo=None if self.echoes is None else self.echoes[place],
            logprobs=logprobs,
            num_prompt_logprobs=fields.prompt_logprobs,
        )
