"""Tool-call parsers: a model's text in, prose and tool calls out.

They do not know dialects, tokens or reasoning. See docs/tool-parsers.md.
"""

from mlxd.chat.tool_parsers.base import ToolParser
from mlxd.chat.tool_parsers.registry import call_ids, detect, get, make_parser, names

__all__ = ["ToolParser", "call_ids", "detect", "get", "make_parser", "names"]
