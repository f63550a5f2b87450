"""instructor against mlxd, in both dialects: PYTHON with_instructor.py URL LIMITED_URL BUSY_URL."""

import sys
import warnings

import anthropic
import instructor
import openai
from pydantic import BaseModel

URL = sys.argv[1]
FIELDS = '{"name": "Alice", "age": 31}'


class User(BaseModel):
    """A user."""

    name: str
    age: int


def played(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Say: <<<play>>>{text}<<<end>>>"}]


CALL = f'<tool_call>{{"name": "User", "arguments": {FIELDS}}}</tool_call>'
ALICE = {"name": "Alice", "age": 31}
fields = {"model": "default", "response_model": User, "max_tokens": 500, "max_retries": 0}

over_openai = openai.OpenAI(base_url=f"{URL}/v1", api_key="none")
over_anthropic = anthropic.Anthropic(base_url=URL, api_key="none")
warnings.simplefilter("ignore")
tools = instructor.from_openai(over_openai, mode=instructor.Mode.TOOLS)
assert tools.create(messages=played(CALL), **fields).model_dump() == ALICE
partials = list(tools.create_partial(messages=played(CALL), **fields))
assert partials[-1].model_dump() == ALICE and len(partials) > 2
markdown = instructor.from_openai(over_openai, mode=instructor.Mode.MD_JSON)
assert markdown.create(messages=played(f"```json\n{FIELDS}\n```"), **fields).model_dump() == ALICE
claude = instructor.from_anthropic(over_anthropic, mode=instructor.Mode.ANTHROPIC_TOOLS)
assert claude.create(messages=played(CALL), **fields).model_dump() == ALICE

print("instructor: ok")
