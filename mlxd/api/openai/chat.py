"""POST /v1/chat/completions.

It does not know how prompts are written, tokens sampled or frames framed: it joins those who do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
import orjson

from mlxd.api.event_stream import stream_answer
from mlxd.api.generation import Generation, gather_outputs, off_loop
from mlxd.api.http import HTTPRequest
from mlxd.api.openai.frames import ChatFrames, Envelope
from mlxd.api.openai.logprobs import (
    chat_logprobs,
    check_prompt_logprobs,
    mean_logprob,
    vllm_prompt_logprobs,
)
from mlxd.api.openai.mcp_turns import (
    McpTools,
    McpTurn,
    later_choice,
    own_tools,
    read_mcp_tools,
    run_calls,
)
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
from mlxd.api.threads import MANY_MESSAGES, off_loop_if
from mlxd.chat.answer import AnswerRecord
from mlxd.chat.pipeline import OutputPipeline
from mlxd.chat.structured import StructuredOutput
from mlxd.chat.types import Event
from mlxd.engine.prompt_logprobs import PromptLogprobs
from mlxd.engine.request import RequestOutput
from mlxd.errors import ContextLengthExceeded, GenerationTimeout, InvalidRequestError

T = TypeVar("T")


async def create_chat_completion(request: HTTPRequest, services: Services) -> None:
    """Answer a chat, whole or as a stream."""
    fields = await services.read(request, ChatCompletionRequest)
    model = services.model
    model.check_name(fields.model)
    refuse_unsupported(fields)
    services.engine.check_ready()
    chat = _Chat(request, services, fields, read_mcp_tools(fields, services.mcp))
    turn = await chat.first_turn()
    if fields.stream:
        follow_up = None if turn.mcp is None else chat.next_generation
        await stream_answer(request, turn.generation, chat.frames(turn), follow_up)
    else:
        await request.respond(200, await chat.answer(turn))
    chat.follow_up()


@dataclass(slots=True, kw_only=True)
class _Turn:
    """One answer of the model. `mcp` decides which of its calls the client sees, if the server runs any."""

    generation: Generation
    plan: SequencePlan
    prompt: ChatPrompt
    pipelines: list[OutputPipeline]
    mcp: McpTurn | None


class _Chat:
    """A request's way to its answer: one turn of the model, or several with MCP tools run in between."""

    def __init__(
        self,
        request: HTTPRequest,
        services: Services,
        fields: ChatCompletionRequest,
        mcp_tools: McpTools | None,
    ) -> None:
        model = services.model
        self._request = request
        self._services = services
        self._fields = fields
        self._messages = list(fields.messages)
        self._mcp_tools = mcp_tools
        self._tools = fields.tools
        if mcp_tools is not None:
            self._tools = own_tools(fields.tools) + mcp_tools.functions()
        self._num_logprobs = _num_logprobs(fields)
        self._plan = plan_sequences(
            fields,
            services.config,
            model.files,
            model.vocab_size,
            num_logprobs=self._num_logprobs,
        )
        self._envelope = Envelope(
            id=f"chatcmpl-{services.new_id()}",
            object="chat.completion.chunk" if fields.stream else "chat.completion",
            created=int(services.now()),
            model=model.name,
            system_fingerprint=model.fingerprint,
        )
        timeout = self._plan.common.timeout_seconds or services.config.limits.timeout_seconds
        self._deadline = request.arrival_time + timeout
        self._turns: list[_Turn] = []
        self._frames: ChatFrames | None = None
        self._record: AnswerRecord | None = None
        self._mcp_calls: list[dict[str, Any]] = []
        self._echo = _echo(fields.messages) if fields.echo else ""

    async def first_turn(self) -> _Turn:
        return await self._turn(self._fields.tool_choice)

    def frames(self, turn: _Turn) -> ChatFrames:
        """What makes the stream of this turn and those that follow it."""
        self._frames = ChatFrames(
            self._envelope,
            turn.plan.num_choices,
            self._fields.stream_options,
            tokenizer=self._services.model.tokenizer,
            num_logprobs=self._num_logprobs,
            pipelines=turn.pipelines,
            thinks=turn.prompt.answer.thinks,
            echo=self._echo,
            prompt_logprobs=None
            if self._fields.prompt_logprobs is None
            else (turn.prompt.token_ids, self._fields.prompt_logprobs),
            record=self._record,
        )
        self._frames.mcp_turn = turn.mcp
        return self._frames

    async def next_generation(self) -> tuple[Generation | None, bytes]:
        """The next turn's generation, once the calls of the last one have been run, and the frame that tells
        of them; None where there were none."""
        turn, shown = await self._next_turn()
        if turn is None or self._frames is None:
            return None, b""
        self._frames.next_turn(turn.pipelines, turn.mcp)
        return turn.generation, self._frames.mcp_calls(shown)

    async def answer(self, turn: _Turn) -> bytes:
        """The whole answer's JSON."""
        usage = Usage(turn.plan.num_sampled)
        events: list[Event] = []
        first: list[RequestOutput] = []
        while True:
            outputs = await gather_outputs(turn.generation, turn.plan.num_sampled)
            first = first or outputs
            for output in outputs:
                usage.add(output)
            if turn.mcp is None:
                break
            [output], [pipeline] = outputs, turn.pipelines
            events += turn.mcp.feed(pipeline.feed(output.text) + pipeline.finish())
            events += turn.mcp.close(output.finish_reason)
            following, _ = await turn.generation.run(self._next_turn())
            if following is None:
                break
            if turn.generation.cause is not None:
                following.generation.end(turn.generation.cause)
            turn = following
        last, known = turn, first[0].prompt_logprobs

        def write() -> bytes:
            if last.mcp is not None:
                choices = [self._choice(0, outputs[0], events, last.mcp.num_released > 0)]
            else:
                choices = self._choices(last, outputs)
            return orjson.dumps(self._object(choices, usage, known))

        answer = await off_loop([*first, *outputs], write)
        if self._record is not None:
            self._record.is_complete = True
        return answer

    def follow_up(self) -> None:
        """The answer is out: if the next turn will have it in other words, let those be computed."""
        record, next_turns, first = self._record, self._services.next_turns, self._turns[0]
        if record is None or next_turns is None or not record.is_complete:
            return
        if len(self._turns) == 1 and not record.may_be_reworded:
            return
        [answer] = template_messages([msgspec.convert(whole_message(record.events()), ChatMessage)])
        next_turns.add(first.prompt, answer, self._request.caller, first.plan.common.cache_salt)

    def _choices(self, turn: _Turn, outputs: list[RequestOutput]) -> list[dict[str, Any]]:
        """The best of `outputs`, where more were made than asked for."""
        if turn.plan.num_sampled > turn.plan.num_choices:
            outputs = sorted(outputs, key=mean_logprob, reverse=True)[: turn.plan.num_choices]
        choices: list[dict[str, Any]] = []
        for output in outputs:
            pipeline = turn.pipelines[output.index]
            events = pipeline.feed(output.text) + pipeline.finish()
            choices.append(self._choice(len(choices), output, events, pipeline.num_calls > 0))
        return choices

    async def _next_turn(self) -> tuple[_Turn | None, list[dict[str, Any]]]:
        last = self._turns[-1].mcp
        hub, tools = self._services.mcp, self._mcp_tools
        if last is None or not last.calls or hub is None or tools is None:
            return None, []
        results, shown = await self._in_time(run_calls(hub, tools.offered, last.calls), "MCP tools ran")
        self._messages += [last.message(), *results]
        self._mcp_calls += shown
        return await self._turn(later_choice(self._fields.tool_choice)), shown

    async def _in_time(self, work: Awaitable[T], happening: str) -> T:
        try:
            async with asyncio.timeout_at(self._deadline):
                return await work
        except TimeoutError:
            raise GenerationTimeout(f"the request's time was up while {happening}") from None

    async def _turn(self, tool_choice: Any) -> _Turn:
        fields, services = self._fields, self._services
        budget = None if fields.thinking_token_budget == -1 else fields.thinking_token_budget
        is_first = not self._turns
        prompt = await encode_chat(
            services.model,
            self._messages,
            tools=self._tools,
            tool_choice=tool_choice,
            parallel_tool_calls=fields.parallel_tool_calls,
            thinking_token_budget=budget,
            add_generation_prompt=fields.add_generation_prompt if is_first else True,
            continue_final_message=fields.continue_final_message if is_first else False,
            add_special_tokens=fields.add_special_tokens,
            kwargs=_template_kwargs(fields, budget),
            structured=read_structured_output(fields),
        )
        plan = self._plan
        pipelines = prompt.pipelines(
            plan.num_sampled, services.new_id, skip_special_tokens=plan.common.skip_special_tokens
        )
        plan = prompt.plan(plan)
        if is_first:
            limit = services.config.limits.max_prompt_logprobs
            asked = {"prompt_logprobs": fields.prompt_logprobs}
            prompt_logprobs = check_prompt_logprobs([prompt.token_ids], asked, 1, limit)
            plan = plan.with_common(prompt_logprobs=prompt_logprobs)
            if services.next_turns is not None:
                self._record = services.next_turns.record(prompt, plan.num_sampled)
        mcp, turn_id = None, self._envelope.id
        if self._mcp_tools is not None and self._mcp_tools.run and services.mcp is not None:
            if not is_first:  # the worker may have died meanwhile: like a stream, the answer outlives it
                turn_id += f"-{len(self._turns)}"
                await self._in_time(services.engine.until_ready(), "the model's worker started anew")
            mcp = McpTurn(
                self._mcp_tools.run,
                is_last=len(self._turns) + 1 >= services.mcp.config.max_turns,
                after_text=any(turn.mcp is not None and turn.mcp.has_text for turn in self._turns),
            )
        try:
            generation = services.submit(
                self._request, self._envelope.id, plan.sequences(turn_id, [prompt.token_ids])
            )
        except ContextLengthExceeded as error:
            error.param = "messages"
            raise
        turn = _Turn(
            generation=generation,
            plan=plan,
            prompt=prompt,
            pipelines=pipelines,
            mcp=mcp,
        )
        self._turns.append(turn)
        return turn

    def _choice(
        self, index: int, output: RequestOutput, events: list[Event], has_calls: bool
    ) -> dict[str, Any]:
        logprobs = None
        if self._num_logprobs is not None:
            logprobs = chat_logprobs(output, self._services.model.tokenizer, self._num_logprobs)
        if self._record is not None:
            self._record.add(events)
        message = whole_message(events)
        if self._echo:
            message["content"] = self._echo + (message["content"] or "")
        if self._mcp_calls:
            message["mcp_calls"] = self._mcp_calls
        return {
            "index": index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": finish_reason(output.finish_reason, has_calls=has_calls),
            "stop_reason": output.stop_reason,
        }

    def _object(
        self, choices: list[dict[str, Any]], usage: Usage, known: PromptLogprobs | None
    ) -> dict[str, Any]:
        answer = {**self._envelope.fields(), "choices": choices, "usage": usage.to_json()}
        num_top = self._fields.prompt_logprobs
        if known is not None and num_top is not None:
            prompt, tokenizer = self._turns[0].prompt.token_ids, self._services.model.tokenizer
            answer["prompt_logprobs"] = vllm_prompt_logprobs(prompt, known, num_top, tokenizer)
        return answer


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
    rendered = await off_loop_if(len(messages) >= MANY_MESSAGES, lambda: template_messages(messages))
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


def _echo(messages: Sequence[ChatMessage]) -> str:
    """The text of the final message if it is the assistant's: the answer goes on from there, as in vLLM."""
    last = messages[-1] if messages else None
    if last is None or last.role != "assistant" or last.content is None:
        return ""
    if isinstance(last.content, str):
        return last.content
    return "".join(part.text or part.refusal or "" for part in last.content)


def _num_logprobs(fields: ChatCompletionRequest) -> int | None:
    if fields.logprobs:
        return fields.top_logprobs or 0
    if fields.top_logprobs:
        raise InvalidRequestError("top_logprobs: only with logprobs: true", param="top_logprobs")
    return None
