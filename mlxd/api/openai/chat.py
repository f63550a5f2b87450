"""POST /v1/chat/completions.

It does not know how prompts are written, tokens sampled or frames framed: it joins those who do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlxd.api.generation import gather_outputs, stream_answer
from mlxd.api.http import HTTPRequest
from mlxd.api.openai.frames import ChatFrames, Envelope
from mlxd.api.openai.logprobs import chat_logprobs, mean_logprob
from mlxd.api.openai.message import finish_reason, whole_message
from mlxd.api.openai.messages import template_messages
from mlxd.api.openai.sampling import plan_sequences, refuse_unsupported
from mlxd.api.openai.schema import ChatCompletionRequest, ChatMessage
from mlxd.api.openai.structured import read_structured_output
from mlxd.api.openai.usage import Usage
from mlxd.api.prompt import ChatPrompt, encode_conversation
from mlxd.api.sequences import SequencePlan
from mlxd.api.served_model import ServedModel
from mlxd.api.services import Services
from mlxd.chat.pipeline import OutputPipeline
from mlxd.chat.structured import StructuredOutput
from mlxd.engine.request import RequestOutput
from mlxd.errors import ContextLengthExceeded, InvalidRequestError
from mlxd.text.tokenizer import Tokenizer


async def create_chat_completion(request: HTTPRequest, services: Services) -> None:
    """Answer a chat, whole or as a stream."""
    fields = await services.read(request, ChatCompletionRequest)
    model = services.model
    model.check_name(fields.model)
    refuse_unsupported(fields)
    services.engine.check_ready()
    num_logprobs = _num_logprobs(fields)
    plan = plan_sequences(
        fields,
        services.config,
        model.files,
        model.vocab_size,
        max_tokens=fields.max_completion_tokens or fields.max_tokens,
        num_logprobs=num_logprobs,
    )
    budget = None if fields.thinking_token_budget == -1 else fields.thinking_token_budget
    prompt = await encode_chat(
        model,
        fields.messages,
        tools=fields.tools,
        tool_choice=fields.tool_choice,
        parallel_tool_calls=fields.parallel_tool_calls,
        thinking_token_budget=budget,
        add_generation_prompt=fields.add_generation_prompt,
        continue_final_message=fields.continue_final_message,
        add_special_tokens=fields.add_special_tokens,
        kwargs=_template_kwargs(fields, budget),
        structured=read_structured_output(fields),
    )
    pipelines = prompt.pipelines(
        plan.num_sampled, services.new_id, skip_special_tokens=plan.skip_special_tokens
    )
    plan = prompt.plan(plan)
    envelope = Envelope(
        id=f"chatcmpl-{services.new_id()}",
        object="chat.completion.chunk" if fields.stream else "chat.completion",
        created=int(services.now()),
        model=model.name,
        system_fingerprint=model.fingerprint,
    )
    frames = ChatFrames(
        envelope,
        plan.num_choices,
        include_usage=bool(fields.stream_options and fields.stream_options.include_usage),
        tokenizer=model.tokenizer,
        num_logprobs=num_logprobs,
        pipelines=pipelines,
        thinks=prompt.answer.thinks,
    )
    try:
        generation = services.submit(request, envelope.id, plan.sequences(envelope.id, [prompt.token_ids]))
    except ContextLengthExceeded as error:
        error.param = "messages"
        raise
    if fields.stream:
        await stream_answer(request, generation, frames)
        return
    outputs = await gather_outputs(generation, plan.num_sampled)
    await request.respond_json(
        200, _answer(envelope, outputs, plan, pipelines, model.tokenizer, num_logprobs)
    )


async def encode_chat(
    model: ServedModel,
    messages: Sequence[ChatMessage],
    *,
    tools: list[Any] | None,
    tool_choice: Any = None,
    parallel_tool_calls: bool | None = None,
    thinking_token_budget: int | None = None,
    add_generation_prompt: bool | None,
    continue_final_message: bool | None,
    add_special_tokens: bool | None,
    kwargs: Mapping[str, Any],
    structured: StructuredOutput | None = None,
) -> ChatPrompt:
    """The prompt. A generation prompt is added unless the final message is to be continued.

    Raises:
        InvalidRequestError: the messages, the tools, the template or the combination of the two flags will
            not do.
    """
    rendered = template_messages(messages)
    if continue_final_message and add_generation_prompt:
        raise InvalidRequestError(
            "continue_final_message: contradicts add_generation_prompt", param="continue_final_message"
        )
    clash = kwargs.keys() & {"messages", "tools", "add_generation_prompt", "continue_final_message"}
    if clash:
        raise InvalidRequestError(
            f"chat_template_kwargs: {min(clash)} is a field of its own", param="chat_template_kwargs"
        )
    return await encode_conversation(
        model,
        rendered,
        tools=tools,
        tool_choice=tool_choice,
        parallel_tool_calls=parallel_tool_calls,
        thinking_token_budget=thinking_token_budget,
        add_generation_prompt=(
            not continue_final_message if add_generation_prompt is None else add_generation_prompt
        ),
        continue_final_message=bool(continue_final_message),
        add_special_tokens=bool(add_special_tokens),
        kwargs=kwargs,
        structured=structured,
    )


def _template_kwargs(fields: ChatCompletionRequest, budget: int | None) -> dict[str, Any]:
    """Variables of the template. Families have their own names for the switch and for the budget."""
    kwargs = dict(fields.chat_template_kwargs or {})
    effort, enable = fields.reasoning_effort, fields.enable_thinking
    if effort == "none":
        enable = False if enable is None else enable
    elif effort is not None:
        kwargs["reasoning_effort"] = effort
    if enable is not None:
        kwargs["enable_thinking"] = enable
        kwargs.setdefault("thinking", enable)
    if budget is not None:
        kwargs.setdefault("thinking_budget", budget)
    return kwargs


def _num_logprobs(fields: ChatCompletionRequest) -> int | None:
    if fields.logprobs:
        return fields.top_logprobs or 0
    if fields.top_logprobs:
        raise InvalidRequestError("top_logprobs: only with logprobs: true", param="top_logprobs")
    return None


def _answer(
    envelope: Envelope,
    outputs: list[RequestOutput],
    plan: SequencePlan,
    pipelines: Sequence[OutputPipeline],
    tokenizer: Tokenizer,
    num_logprobs: int | None,
) -> dict[str, Any]:
    usage = Usage(plan.num_sampled)
    for output in outputs:
        usage.add(output)
    if plan.num_sampled > plan.num_choices:
        outputs = sorted(outputs, key=mean_logprob, reverse=True)[: plan.num_choices]
    choices: list[dict[str, Any]] = []
    for output in outputs:
        pipeline = pipelines[output.index]
        message = whole_message(pipeline.feed(output.text) + pipeline.finish())
        choices.append(
            {
                "index": len(choices),
                "message": message,
                "logprobs": None if num_logprobs is None else chat_logprobs(output, tokenizer, num_logprobs),
                "finish_reason": finish_reason(output.finish_reason, has_calls=pipeline.num_calls > 0),
                "stop_reason": output.stop_reason,
            }
        )
    return {**envelope.fields(), "choices": choices, "usage": usage.to_json()}
