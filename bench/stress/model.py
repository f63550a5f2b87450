"""A tiny model with random weights and a tokenizer of ASCII: its answers cost little and differ.

It does not know what is asked of it. MLX is needed to write it, so that is a process of its own:
`python -m bench.stress.model FOLDER SHAPE` (bench.engine.shapes).
"""

from __future__ import annotations

import importlib
import json
import string
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from bench.engine.shapes import SHAPES
from bench.serve.workload import WORDS

END = "<|im_end|>"
VOCAB_SIZE = 288
THINKING_TEMPLATE = "thinking.jinja"
"""a file beside the others: the same, with a block of thoughts begun"""
CHAT_TEMPLATE = """{%- if tools %}tools:{% for tool in tools %} {{ tool.function.name }}{% endfor %}
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content or '' }}
{%- for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def write_tokenizer(folder: Path) -> None:
    """Single characters and some parts of words, so that an answer that is sent back may be cut in other
    tokens than it was made of. Every token is printable: nothing is lost in a text."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = [char for char in string.printable[:95] if char != " "] + ["Ġ", "Ċ"]
    trainer = BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|im_start|>", END],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {
        "eos_token": END,
        "chat_template": CHAT_TEMPLATE,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    begun = "{%- if enable_thinking is not false %}<think>\n{% endif %}{% endif %}"
    (folder / THINKING_TEMPLATE).write_text(CHAT_TEMPLATE.removesuffix("{% endif %}") + begun)


def write_model(folder: Path, shape: str) -> None:
    """Everything that a server reads. Weights are the same every time, and spread enough for greedy answers
    to vary and not to tie."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    size = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    config = SHAPES[shape] | {"vocab_size": size, "torch_dtype": "float32", "eos_token_id": 1}
    (folder / "config.json").write_text(json.dumps(config))
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict(config))
    keys = iter(mx.random.split(mx.random.key(0), 1000))
    arrays = {
        name: mx.random.normal(weight.shape, key=next(keys)) * (1.5 / weight.shape[-1] ** 0.5)
        if weight.ndim > 1
        else weight
        for name, weight in tree_flatten(model.parameters())
    }
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, metadata={"format": "mlx"})


if __name__ == "__main__":
    write_model(Path(sys.argv[1]), sys.argv[2])
