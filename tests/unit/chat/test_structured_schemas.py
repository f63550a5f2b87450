"""200 JSON schemas: whatever their grammars let through is valid, as jsonschema sees it."""

from __future__ import annotations

import random

import jsonschema
import pytest

from mlxd.chat import structured
from tests.unit.chat.grammar_walk import Walker
from tests.unit.chat.made_schemas import Maker, problems

NUM_SCHEMAS = 200
NUM_TEXTS = 3


@pytest.fixture(scope="module")
def walker(tmp_path_factory: pytest.TempPathFactory) -> Walker:
    return Walker(str(tmp_path_factory.mktemp("tokenizer")))


def test_everything_that_comes_out_is_valid(walker: Walker) -> None:
    num_finished = 0
    for seed in range(NUM_SCHEMAS):
        source = random.Random(seed)
        schema = Maker(source).schema()
        jsonschema.Draft202012Validator.check_schema(schema)
        grammar = structured.compose("@answer", {"answer": structured.json_schema(schema, "schema").grammar})
        assert structured.compile_error(grammar) is None, schema
        for _ in range(NUM_TEXTS):
            text = walker.walk(grammar, source, max_tokens=3000)
            if text is None:
                continue
            num_finished += 1
            assert not problems(schema, text), (schema, text)
    assert num_finished > 0.9 * NUM_SCHEMAS * NUM_TEXTS
