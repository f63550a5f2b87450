"""POST /v1/messages and /v1/messages/count_tokens.

It does not know how prompts are written, tokens sampled or frames framed: it joins those who do.
"""

from __future__ import annotations

from typing import Any

from mlxd.api.anthropic.blocks import BlockSplitter, ThinkingDisplay, whole_blocks
from mlxd.api.anthropic.conversation import (
    answer_message,
    continues_answer,
    marks_cache_points,
    template_messages,
)
from mlxd.api.anthropic.frames import MessageFrames
from mlxd.api.anthropic.message import MessageHead
from mlxd.api.anthropic.schema import (
    CountTokensRequest,
    MessageFields,
    MessagesRequest,
    OutputConfig,
    Thinking,
)
from mlxd.api.anthropic.tools import openai_tool_choice, openai_tools, tools_named_as_here
from mlxd.api.event_stream import stream_answer
from mlxd.api.generation import gather_outputs
from mlxd.api.http import HTTPRequest
from mlxd.api.prompt import ChatPrompt, encode_conversation
from mlxd.api.sequences import SequencePlan, resolve_sampling, stop_strings, stream_interval
from mlxd.api.services import Services
from mlxd.api.threads import MANY_MESSAGES, off_loop_if
from mlxd.chat.structured import StructuredOutput, json_schema
from mlxd.engine.request import GenerationRequest
from mlxd.errors import ContextLengthExceeded, InvalidRequestError, ThreadsUnsupported

_REFUSED = ("container", "mcp_servers")
"""Fields whose every value but null and empty asks for what this server cannot do."""

_EFFORTS = {"xhigh": "high", "max": "high"}


async def create_message(request: HTTPRequest, services: Services) -> None:
    """Answer a conversation, whole or as a stream."""
    fields = await services.read(request, MessagesRequest)
    model = services.model
    model.check_name(fields.model)
    _refuse_unsupported(fields)
    services.engine.check_ready()
    config = services.config
    common = GenerationRequest(
        request_id="",
        prompt_token_ids=[],
        max_tokens=fields.max_tokens,
        sampling=resolve_sampling(
            config,
            model.files,
            temperature=fields.temperature,
            top_p=fields.top_p,
            top_k=fields.top_k,
        ),
        stop=stop_strings(fields.stop_sequences, config.limits.max_stop_strings, param="stop_sequences"),
        stream_interval=stream_interval(config, fields.stream),
        timeout_seconds=config.limits.timeout_seconds,
        cache_salt=fields.cache_salt or "",
    )
    prompt = await _encode(fields, services)
    plan = prompt.plan(SequencePlan(common=common))
    [pipeline] = prompt.pipelines(1, services.new_id)
    head = MessageHead(
        id=f"msg_{services.new_id()}",
        request_id=request.request_id,
        model=model.name,
        num_prompt_tokens=len(prompt.token_ids),
        marks_cache_points=marks_cache_points(fields),
    )
    try:
        generation = services.submit(request, head.id, plan.sequences(head.id, [prompt.token_ids]))
    except ContextLengthExceeded as error:
        # In Anthropic's words, by which agents know that it is time to compact their history.
        raise ContextLengthExceeded(
            f"prompt is too long: {head.num_prompt_tokens} tokens > {model.max_model_len} maximum "
            f"(and max_tokens: {fields.max_tokens})",
            param="messages",
        ) from error
    display = _thinking_display(fields.thinking)
    splitter = BlockSplitter(display)
    next_turns = services.next_turns
    record = None if next_turns is None else next_turns.record(prompt, 1)
    if fields.stream:
        await stream_answer(request, generation, MessageFrames(head, pipeline, splitter, record))
    else:
        [output] = await gather_outputs(generation, 1)
        events = pipeline.feed(output.text) + pipeline.finish()
        content = whole_blocks(events, splitter)
        closing = head.closing(output, has_calls=splitter.has_calls)
        await request.respond_json(200, {**head.opening(), "content": content, **closing})
        if record is not None:
            record.add(events)
            record.is_complete = True
    if next_turns is not None and record is not None and record.is_complete and record.may_be_reworded:
        answer = answer_message(whole_blocks(record.events(), BlockSplitter(display)))
        next_turns.add(prompt, answer, request.caller, common.cache_salt, returns_thinking=True)


async def count_tokens(request: HTTPRequest, services: Services) -> None:
    """`{input_tokens}`: what the same request to /v1/messages would read."""
    fields = await services.read(request, CountTokensRequest)
    services.model.check_name(fields.model)
    _refuse_unsupported(fields)
    services.engine.check_ready()
    prompt = await _encode(fields, services)
    await request.respond_json(200, {"input_tokens": len(prompt.token_ids)})


async def _encode(fields: MessageFields, services: Services) -> ChatPrompt:
    is_long = len(fields.messages) >= MANY_MESSAGES
    messages = await off_loop_if(is_long, lambda: template_messages(fields))
    continues = continues_answer(fields)
    thinking, choice = fields.thinking, fields.tool_choice
    with tools_named_as_here():
        return await encode_conversation(
            services.model,
            messages,
            tools=openai_tools(fields.tools),
            tool_choice=openai_tool_choice(choice),
            parallel_tool_calls=not (choice and choice.disable_parallel_tool_use),
            thinking_token_budget=thinking.budget_tokens if thinking else None,
            # Agents ask every model to think.
            insists_on_budget=False,
            structured=_structured(fields),
            add_generation_prompt=not continues,
            continue_final_message=continues,
            kwargs=_template_kwargs(thinking, fields.output_config),
        )


def _structured(fields: MessageFields) -> StructuredOutput | None:
    """The form that the answer must have; None where it may be any text."""
    if fields.output_config is not None and fields.output_config.format is not None:
        if fields.output_format is not None:
            raise InvalidRequestError(
                "output_format: output_config.format asks for a form already", param="output_format"
            )
        return json_schema(fields.output_config.format.schema, "output_config.format.schema")
    if fields.output_format is not None:
        return json_schema(fields.output_format.schema, "output_format.schema")
    return None


def _template_kwargs(thinking: Thinking | None, output_config: OutputConfig | None) -> dict[str, Any]:
    """What templates know of thinking, under each family's names. What is left open is the model's to say."""
    kwargs: dict[str, Any] = {}
    if thinking is not None:
        kwargs["enable_thinking"] = kwargs["thinking"] = thinking.type != "disabled"
        if thinking.budget_tokens is not None:
            kwargs["thinking_budget"] = thinking.budget_tokens
    if output_config is not None and output_config.effort is not None:
        # Templates know OpenAI's three.
        kwargs["reasoning_effort"] = _EFFORTS.get(output_config.effort, output_config.effort)
    return kwargs


def _thinking_display(thinking: Thinking | None) -> ThinkingDisplay:
    """A model that thinks without being asked to still must not answer `disabled` with thinking blocks."""
    if thinking is not None and thinking.type == "disabled":
        return ThinkingDisplay.HIDDEN
    if thinking is not None and thinking.display == "omitted":
        return ThinkingDisplay.OMITTED
    return ThinkingDisplay.SHOWN


def _refuse_unsupported(fields: MessageFields) -> None:
    if fields.thread is not None:
        # To answer what creates one would be worse: of the next turn the client would send only what is new.
        raise ThreadsUnsupported(
            "thread: this server keeps no conversations; send all messages, system and tools", param="thread"
        )
    for name in _REFUSED:
        if getattr(fields, name) not in (None, [], {}):
            raise InvalidRequestError(
                f"{name}: not supported by this server", param=name, code="unsupported_parameter"
            )
