"""The tokeniser: encoding with and without special tokens, token texts and bytes, loading, conversion."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers

from mlxd.errors import ConfigError, InvalidRequestError
from mlxd.text.model_files import ModelFiles
from mlxd.text.tokenizer import Tokenizer
from tests.unit.text import small_tokenizers


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    return Tokenizer(small_tokenizers.byte_level(bos=True), bos_token="<s>", eos_token="<|im_end|>")


@pytest.fixture(scope="module")
def byte_fallback() -> Tokenizer:
    return Tokenizer(small_tokenizers.byte_fallback(bos=True), bos_token="<s>", eos_token="</s>")


def save(tokenizer: tokenizers.Tokenizer, folder: Path, **config: object) -> ModelFiles:
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return ModelFiles.read(folder)


def test_bos_is_added_by_the_post_processor_if_asked_for(byte_level: Tokenizer) -> None:
    bare = byte_level.encode("the cat", add_special_tokens=False)
    assert byte_level.encode("the cat") == [byte_level.bos_token_id, *bare]
    assert byte_level.encode("<s>the cat", add_special_tokens=False) == [byte_level.bos_token_id, *bare]
    assert byte_level.encode_batch(["the cat", ""], False) == [bare, []]
    assert byte_level.encode_batch(["the cat"]) == [byte_level.encode("the cat")]


def test_special_tokens_in_the_text_are_tokens_and_are_skipped_on_request(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("<|im_start|>a<tool call><|im_end|>", add_special_tokens=False)
    assert ids[0] == byte_level.token_to_id("<|im_start|>")
    assert ids[-1] == byte_level.eos_token_id
    assert byte_level.decode(ids) == "a<tool call>"
    assert byte_level.decode(ids, skip_special_tokens=False) == "<|im_start|>a<tool call><|im_end|>"
    assert byte_level.special_token_ids == {
        byte_level.token_to_id(t) for t in small_tokenizers.SPECIAL_TOKENS
    }


def test_text_that_is_not_unicode_is_the_clients_mistake(byte_level: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="surrogate"):
        byte_level.encode("a\ud800")
    with pytest.raises(InvalidRequestError, match="surrogate"):
        byte_level.encode_batch(["a\ud800"])


def test_ids_out_of_range(byte_level: Tokenizer) -> None:
    beyond = byte_level.vocab_size
    assert byte_level.decode([beyond]) == ""
    assert byte_level.token_text(beyond) == ""
    assert byte_level.token_bytes(beyond) == b""
    assert byte_level.token_text(beyond - 1)
    assert byte_level.detokenizer(True).add(beyond) == ""
    for token_id in (-1, 2**32):
        with pytest.raises(InvalidRequestError, match="range"):
            byte_level.decode([token_id])


@pytest.mark.parametrize("make", [small_tokenizers.byte_level, small_tokenizers.byte_fallback])
def test_the_bytes_of_tokens_are_the_bytes_of_the_text(make: type[tokenizers.Tokenizer]) -> None:
    tokenizer = Tokenizer(make())
    text = "the é日🙂 end"
    ids = tokenizer.encode(text)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode().lstrip() == text
    assert any("\ufffd" in tokenizer.token_text(i) for i in ids)


def test_the_text_of_a_token_is_readable(byte_level: Tokenizer, byte_fallback: Tokenizer) -> None:
    def text(tokenizer: Tokenizer, token: str) -> str:
        token_id = tokenizer.token_to_id(token)
        assert token_id is not None
        return tokenizer.token_text(token_id)

    assert text(byte_level, "Ġthe") == " the"
    assert text(byte_level, "Ċ") == "\n"
    assert text(byte_level, "<s>") == "<s>"
    assert text(byte_level, "<tool call>") == "<tool call>"
    assert text(byte_fallback, "▁the") == " the"
    assert text(byte_fallback, "<0x41>") == "A"
    assert text(byte_fallback, "<0xFF>") == "\ufffd"
    assert byte_fallback.token_bytes(byte_fallback.token_to_id("<0xFF>") or 0) == b"\xff"


def test_a_continuation_keeps_the_space_that_a_beginning_loses(byte_fallback: Tokenizer) -> None:
    the = byte_fallback.token_to_id("▁the")
    assert the is not None
    prompt = byte_fallback.encode("the cat")
    assert byte_fallback.detokenizer(True).add(the) == "the"
    assert byte_fallback.detokenizer(True, prompt).add(the) == " the"
    # Special tokens are no text: what follows them alone is still the beginning, unless they are shown.
    assert byte_fallback.bos_token_id is not None
    assert byte_fallback.detokenizer(True, [byte_fallback.bos_token_id]).add(the) == "the"
    assert byte_fallback.detokenizer(False, [byte_fallback.bos_token_id]).add(the) == " the"


def test_a_character_appears_with_its_last_byte(byte_level: Tokenizer) -> None:
    detokenizer = byte_level.detokenizer(True)
    ids = byte_level.encode("🙃", add_special_tokens=False)
    texts = [detokenizer.add(i) for i in ids]
    assert len(ids) > 1
    assert texts == [""] * (len(ids) - 1) + ["🙃"]
    assert detokenizer.finish() == ""


def test_an_unfinished_character_becomes_a_replacement_character(byte_level: Tokenizer) -> None:
    detokenizer = byte_level.detokenizer(True)
    ids = byte_level.encode("a🙃", add_special_tokens=False)[:-1]
    assert "".join(map(detokenizer.add, ids)) == "a"
    assert detokenizer.finish() == byte_level.decode(ids).removeprefix("a") == "\ufffd"


def test_a_prompt_may_end_after_any_byte_of_a_character(byte_level: Tokenizer) -> None:
    by_bytes = {byte_level.token_bytes(i): i for i in range(byte_level.vocab_size)}
    ids = [by_bytes[bytes([byte])] for byte in "ab🙃".encode()]
    for cut in range(2, len(ids)):
        detokenizer = byte_level.detokenizer(True, ids[:cut])
        assert "".join(map(detokenizer.add, ids[cut:])) == "🙃"


def test_leading_spaces_may_be_spread_over_tokens_and_be_bytes() -> None:
    tokenizer = Tokenizer(small_tokenizers.byte_fallback(strip=3))
    space, byte, the = (tokenizer.token_to_id(token) or 0 for token in ("▁", "<0x20>", "▁the"))
    for ids in ([space, byte, the, space], [byte, byte], [space, space, space, space, the], [byte] * 4):
        detokenizer = tokenizer.detokenizer(True)
        text = "".join(map(detokenizer.add, ids)) + detokenizer.finish()
        assert text == tokenizer.decode(ids)


def test_only_visible_tokens_make_the_next_one_a_continuation() -> None:
    tokenizer = Tokenizer(small_tokenizers.metaspace())
    the, bos = tokenizer.token_to_id("▁the") or 0, tokenizer.token_to_id("<s>") or 0
    assert tokenizer.detokenizer(True, [bos]).add(the) == "the"
    assert tokenizer.detokenizer(False, [bos]).add(the) == " the"
    assert tokenizer.detokenizer(True, [the]).add(the) == " the"


def test_an_unknown_decoder_sees_what_came_before() -> None:
    source = small_tokenizers.metaspace()
    source.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Metaspace(), tokenizers.decoders.Fuse()]
    )
    tokenizer = Tokenizer(source)
    ids = tokenizer.encode("the cat at the cat at the cat")
    detokenizer = tokenizer.detokenizer(True)
    assert "".join(map(detokenizer.add, ids)) + detokenizer.finish() == tokenizer.decode(ids)


def test_length_limits_of_training_are_lifted(tmp_path: Path) -> None:
    limited = small_tokenizers.byte_level()
    limited.enable_truncation(4)
    limited.enable_padding(length=8)
    tokenizer = Tokenizer.load(save(limited, tmp_path))
    assert tokenizer.decode(tokenizer.encode("the quick brown fox")) == "the quick brown fox"
    assert len(tokenizer.encode("t")) == 1


def test_loading(tmp_path: Path) -> None:
    files = save(
        small_tokenizers.byte_level(bos=True), tmp_path, bos_token="<s>", eos_token={"content": "</s>"}
    )
    tokenizer = Tokenizer.load(files)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert files.eos_token_ids == (tokenizer.eos_token_id,)
    assert tokenizer.encode("")[0] == tokenizer.bos_token_id
    assert tokenizer.vocab_size == small_tokenizers.byte_level().get_vocab_size()


def test_a_broken_tokenizer_file_is_a_configuration_error(tmp_path: Path) -> None:
    files = ModelFiles.read(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ConfigError, match=r"tokenizer\.json: not a tokeniser"):
        Tokenizer.load(files)


def test_a_folder_without_a_tokeniser_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        Tokenizer.load(ModelFiles.read(tmp_path))


def test_other_tokeniser_files_are_converted_by_another_process(tmp_path: Path) -> None:
    source = small_tokenizers.byte_level()
    source.model.save(str(tmp_path))  # vocab.json and merges.txt, GPT-2's files
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    tokenizer = Tokenizer.load(ModelFiles.read(tmp_path))
    text = "the quick brown é日🙂"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert "transformers" not in _modules_after("import mlxd.text.tokenizer")


def test_the_front_process_stays_light() -> None:
    """Neither mlx nor transformers, nor what they bring: 50 MB and more than a second."""
    modules = _modules_after("import mlxd.text.tokenizer, mlxd.chat.template, mlxd.chat.pipeline")
    assert not modules & {"mlx", "transformers", "numpy", "torch", "huggingface_hub"}


def _modules_after(statement: str) -> set[str]:
    code = f"{statement}; import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=60)
    return set(done.stdout.decode().split())
