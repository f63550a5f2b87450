"""Chat templates: messages to prompt text, exactly as transformers' `apply_chat_template` renders them.

It does not know HTTP, dialects or tokens. Messages are plain JSON values in OpenAI's shape; messages.py
brings them into the form that the template wants.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Protocol

import jinja2

from mlxd.chat.messages import Message, prepare_messages
from mlxd.chat.template_environment import Clock, TemplateRefusal, make_environment
from mlxd.chat.template_probe import TemplateProbe
from mlxd.errors import ConfigError, InvalidRequestError
from mlxd.text.model_files import DEFAULT_TEMPLATE, ModelFiles

TOOL_TEMPLATE = "tool_use"

MAX_PROMPT_CHARACTERS = 64 * 1024 * 1024
"""No template may write more: it bounds what the loops of a hostile one do to memory."""

_CONTINUE_MARK = "MLXD-CONTINUES-HERE "
"""Stands at the end of the message to continue; if its space is gone, the template trims."""


class SpecialTokens(Protocol):
    """What a template needs of a tokeniser."""

    bos_token: str | None
    eos_token: str | None


class ChatTemplate:
    """A model's chat template, compiled once. Rendering is safe from several threads.

    `supports_tools`, `supports_calls` (calls and their results in the history) and `supports_system` are
    found out at load, by rendering small conversations. `source` is all of its Jinja text.
    """

    __slots__ = (
        "_style",
        "_templates",
        "_variables",
        "source",
        "supports_calls",
        "supports_system",
        "supports_tools",
    )

    def __init__(
        self, templates: Mapping[str, str], variables: Mapping[str, str], *, clock: Clock = datetime.now
    ) -> None:
        """`templates` maps names to Jinja source (at least one), `variables` are the special tokens.

        Raises ConfigError where a template is not valid Jinja.
        """
        environment = make_environment(clock)
        self._templates = {name: _compile(environment, name, text) for name, text in templates.items()}
        self._variables = dict(variables)
        self.source = "\n".join(templates.values())
        probe = TemplateProbe(self._render)
        self._style = probe.style(knows_developer=any("developer" in text for text in templates.values()))
        self.supports_system = probe.supports_system(self._style)
        self.supports_tools = probe.supports_tools(self._style)
        self.supports_calls = probe.supports_calls(self._style)

    @classmethod
    def from_files(
        cls, files: ModelFiles, tokenizer: SpecialTokens, *, clock: Clock = datetime.now
    ) -> ChatTemplate | None:
        """The model's template; None where it has none: then `no_chat_template()` is the answer to a chat."""
        if not files.chat_templates:
            return None
        ends = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
        variables = {
            **files.special_tokens,
            **{name: text for name, text in ends.items() if text is not None},
        }
        return cls(files.chat_templates, variables, clock=clock)

    def render(
        self,
        messages: Sequence[Message],
        /,
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        """The prompt's text.

        `tools` are in OpenAI's shape; an empty list is none. `continue_final_message` leaves the last message
        open, and excludes `add_generation_prompt`. `kwargs` (chat_template_kwargs) become variables of the
        template. Raises InvalidRequestError where the template refuses the conversation, with its message, or
        fails on it.
        """
        if "messages" in kwargs:
            raise InvalidRequestError("messages cannot be set here", param="chat_template_kwargs")
        if not messages:
            raise InvalidRequestError("at least one message is needed", param="messages")
        if continue_final_message and add_generation_prompt:
            raise InvalidRequestError(
                "continue_final_message and add_generation_prompt exclude each other",
                param="continue_final_message",
            )
        prepared = prepare_messages(messages, self._style)
        kwargs["add_generation_prompt"] = add_generation_prompt
        if not continue_final_message:
            return self._render(prepared, tools, **kwargs)
        final_text = _mark_end(prepared[-1])
        return _cut_at_mark(self._render(prepared, tools, **kwargs), final_text)

    def _render(
        self, messages: list[Message], tools: Sequence[dict[str, Any]] | None, /, **kwargs: Any
    ) -> str:
        template = self._templates[self._pick(bool(tools))]
        variables = {
            **self._variables,
            "documents": None,
            "add_generation_prompt": True,
            **kwargs,
            "messages": messages,
            "tools": list(tools) if tools else None,
        }
        pieces: list[str] = []
        size = 0
        try:
            for piece in template.generate(variables):
                size += len(piece)
                if size > MAX_PROMPT_CHARACTERS:
                    raise TemplateRefusal(f"the prompt has more than {MAX_PROMPT_CHARACTERS} characters")
                pieces.append(piece)
        except TemplateRefusal as error:
            raise InvalidRequestError(f"the chat template refused: {error}", param="messages") from error
        except Exception as error:  # a template's expressions can raise anything that Python's can
            raise InvalidRequestError(
                f"the chat template failed on this conversation: {type(error).__name__}: {error}",
                param="messages",
            ) from error
        return "".join(pieces)

    def _pick(self, has_tools: bool) -> str:
        """The name of the template to use; as in transformers, a template for tools has precedence."""
        if has_tools and TOOL_TEMPLATE in self._templates:
            return TOOL_TEMPLATE
        return DEFAULT_TEMPLATE if DEFAULT_TEMPLATE in self._templates else next(iter(self._templates))


def no_chat_template() -> InvalidRequestError:
    """The answer to a chat with a model that has no template. As in vLLM: a guess would be worse."""
    return InvalidRequestError(
        "this model has no chat template, so it cannot take chat messages: give one in the configuration "
        "(model.chat_template) or use /v1/completions",
        param="messages",
    )


def _compile(environment: jinja2.Environment, name: str, source: str) -> jinja2.Template:
    try:
        template = environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"chat template {name!r}, line {error.lineno}: {error.message}") from error
    # They are read anew for every prompt, and Jinja has them in a ChainMap, which takes long to go through.
    template.globals = dict(template.globals)
    return template


def _mark_end(message: Message) -> str:
    """Puts the mark behind the message's last text; returns that text."""
    if message.get("tool_calls"):  # templates write them behind the text, where the prompt is cut
        raise InvalidRequestError(
            "the last message has calls, which only their results can follow", param="continue_final_message"
        )
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = content + _CONTINUE_MARK
        return content
    for part in reversed(content) if isinstance(content, list) else ():
        if "text" in part:
            text: str = part["text"]
            part["text"] = text + _CONTINUE_MARK
            return text
    raise InvalidRequestError("the last message has no text to continue", param="continue_final_message")


def _cut_at_mark(prompt: str, final_text: str) -> str:
    """The prompt up to the end of the final message. Where the template trims messages, so is the prompt."""
    end = prompt.rfind(_CONTINUE_MARK.strip())
    if end < 0 or final_text.strip() not in prompt:
        raise InvalidRequestError(
            "the chat template does not keep the last message as it is, so it cannot be continued",
            param="continue_final_message",
        )
    return prompt[:end] if prompt.startswith(_CONTINUE_MARK, end) else prompt[:end].rstrip()
