"""Small tokenisers of every kind that language models use, built in milliseconds, without files.

They know nothing of mlxd.
"""

from __future__ import annotations

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "the cat sat on the mat; the dog did not. The end, the end!",
    "Grüße aus Köln, où l'été naïve coûte 1234 €. 日本語のテキスト。日本 🙂🙂 👩‍👩‍👧",
    "def f(x):\n    return x + 1\n\n",
]

SPECIAL_TOKENS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")

BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))


def byte_level(bos: bool = False) -> Tokenizer:
    """GPT-2's kind, digits split as SmolLM2 does; with `bos` its post-processor puts <s> in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _finished(tokenizer, bos)


def byte_fallback(strip: int = 1, bos: bool = False) -> Tokenizer:
    """Llama 2's kind, whose decoder drops `strip` leading spaces; Gemma's with 0."""
    pieces = [
        "<unk>",
        *BYTE_TOKENS,
        "▁",
        *"abcdefghijklmnopqrstuvwxyzTHé.,!",
        "th",
        "the",
        "▁the",
        "▁T",
        "▁▁",
    ]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "T"), ("▁", "▁")]
    tokenizer = Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if strip:
        steps.append(decoders.Strip(" ", strip, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    return _finished(tokenizer, bos)


def metaspace() -> Tokenizer:
    """T5's kind: a unigram model whose decoder drops the first token's word mark."""
    words = ["<unk>", "▁", "▁the", "▁cat", "▁", "s", "at", "▁▁on", "é", "日", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(
        models.Unigram([(word, -1.0 - i / 10) for i, word in enumerate(dict.fromkeys(words))], 0)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _finished(tokenizer, bos=False)


def word_piece() -> Tokenizer:
    """BERT's kind."""
    words = ["[UNK]", "the", "cat", "##s", "sat", ".", "'", "do", "not", "n", "##'t", "日", *"abcdefghij"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return _finished(tokenizer, bos=False)


def words_only() -> Tokenizer:
    """One without a decoder: `tokenizers` joins its tokens with spaces."""
    words = ["<unk>", "the", "cat", "sat", "é", "日本"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return _finished(tokenizer, bos=False)


def unknown_decoder() -> Tokenizer:
    """A byte-level one behind a decoder that has to be asked each time."""
    tokenizer = byte_level()
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])
    return tokenizer


def _finished(tokenizer: Tokenizer, bos: bool) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken("<tool call>", normalized=False), AddedToken("▁Ġ", normalized=False)])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    return tokenizer
