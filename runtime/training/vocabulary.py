"""The tokenizer of a trained checkpoint: a byte-level BPE learnt from the training text, with GLM-5's special tokens.

Digits stand alone, so that sums are read and written by place. Free of JAX.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib import resources
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from foundation.errors import UsageError
from model.tokenizer import ChatTemplate
from runtime.training import data, words

# GLM-5's added tokens in its order. What a chat shows (thinking, tool calls) is not "special": decoding keeps it when
# special tokens are skipped.
SPECIAL = (
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>",
    "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
    "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>",
    "<|begin_of_audio|>", "<|end_of_audio|>", "<|begin_of_transcription|>", "<|end_of_transcription|>",
    "<|code_prefix|>", "<|code_middle|>", "<|code_suffix|>",
)  # fmt: skip
VISIBLE = (
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
    "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>",
)  # fmt: skip
STOPS = ("<|endoftext|>", "<|user|>", "<|observation|>")
PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def corpus(template: ChatTemplate) -> Iterator[str]:
    """Text with every word of the training text in every place it may stand, special tokens left out; and a few pages
    of plain English once, for whatever else a person types."""
    yield (resources.files("runtime.training") / "corpus.txt").read_text(encoding="utf-8")
    rng = np.random.default_rng(0)
    source, copied = data.errands(rng, False), data.copies(rng, False)
    for _ in range(400):
        _, turn = next(source)
        text = template.render(turn.messages(), list(words.TOOLS.values()), add_generation_prompt=False)
        for token in SPECIAL + VISIBLE:
            text = text.replace(token, "\n")
        yield text
        yield "".join(data.sentence(rng, False))
        yield next(copied).question
        people = data.Ownership.draw(rng, len(words.NAMES))
        for name in people.things:
            yield f"{people.told()} {people.ask(name).question}\n{people.things[name]}"


def train(texts: Iterable[str], vocab_size: int, pieces: str = PIECES) -> tokenizers.Tokenizer:
    """A byte-level BPE over all 256 bytes, of exactly `vocab_size` tokens with GLM-5's own, learnt from `texts`.

    pieces: the pattern of what no token reaches beyond. Raises `UsageError` where the texts give fewer tokens.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pieces), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL) - len(VISIBLE),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    for names, special in ((SPECIAL, True), (VISIBLE, False)):
        tokenizer.add_tokens([AddedToken(name, special=special, normalized=False) for name in names])
    found = tokenizer.get_vocab_size()
    if found != vocab_size:
        raise UsageError(f"the training text gives {found} tokens; set vocab_size = {found} or less, not {vocab_size}")
    return tokenizer


def stop_ids(tokenizer: tokenizers.Tokenizer) -> list[int]:
    """The ids that end an assistant's turn."""
    return [tokenizer.get_vocab()[name] for name in STOPS]


def tokenizer_config(max_positions: int) -> dict[str, Any]:
    """tokenizer_config.json, as transformers reads it."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": STOPS[0],
        "pad_token": STOPS[0],
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_positions,
        "padding_side": "left",
    }
