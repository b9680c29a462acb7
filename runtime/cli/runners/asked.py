"""What a run is asked in every mode: words, sampling, how to answer; and with a checkpoint, its chat and logits."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from foundation.errors import UsageError, shortened
from foundation.writing import require_writable
from runtime.cli.runners.answers import Answers
from runtime.execution.prompts import read_prompts

if TYPE_CHECKING:
    from model.checkpoint import Checkpoint
    from model.tokenizer import Tokenizer
    from runtime.execution.local.request import Prompt
    from runtime.execution.package.generate import Text
    from runtime.serving.sampling import Sampling

Words = tuple[int, ...] | list[str]
"""The token ids of one prompt, or the texts of one or several."""


@dataclasses.dataclass(frozen=True)
class RunMode(ABC):
    """A run in one mode. Its fields are the options of `glm5 run` that the mode reads, by their names there.

    Raises `UsageError` where two of them contradict each other.
    """

    backend: str
    prompt: str | None
    prompt_ids: str | None
    prompts: Path | None
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    ignore_eos: bool
    as_json: bool

    def __post_init__(self) -> None:
        if sum(option is not None for option in (self.prompt, self.prompt_ids, self.prompts)) > 1:
            raise UsageError("give one of --prompt, --prompt-ids and --prompts")
        self.sampling()

    @classmethod
    def reads(cls) -> frozenset[str]:
        """Names of the options that this mode reads."""
        return frozenset(field.name for field in dataclasses.fields(cls))

    @classmethod
    @abstractmethod
    def why_not(cls, name: str, backend: str) -> str:
        """What to say, behind its name, of an option that this mode does not read."""

    @abstractmethod
    def run(self) -> None:
        """Generates, and prints what came of it."""

    def words(self) -> Words:
        """What to continue. Raises `UsageError`."""
        if self.prompt_ids is not None:
            return _parse_ids(self.prompt_ids)
        return read_prompts(self.prompts) if self.prompts else [self.prompt if self.prompt is not None else "Hello"]

    def sampling(self) -> Sampling:
        """Raises `UsageError`."""
        from runtime.serving.sampling import Sampling

        return Sampling(self.temperature, self.top_p, self.top_k, self.seed)

    def requests(
        self, encoded: Iterable[tuple[int, ...]], ends: Iterable[int], keep_logits: bool = False
    ) -> list[Prompt]:
        """Prompts of token ids. ends: the tokens that end an answer."""
        from runtime.execution.local.request import Prompt

        stop = frozenset() if self.ignore_eos else frozenset(ends)
        return [Prompt(ids, self.max_tokens, self.sampling(), stop, keep_logits) for ids in encoded]

    def answers(self, tokenizer: Tokenizer | Text | None, note: str | None = None) -> Answers:
        """Where the tokens go."""
        many = self.prompts is not None
        return Answers(self.backend, tokenizer, not (self.as_json or many), many, note)


@dataclasses.dataclass(frozen=True)
class CheckpointRun(RunMode):
    """A run of a checkpoint's weights."""

    checkpoint: Path | None
    chat: bool
    no_thinking: bool
    dump_logits: Path | None
    compile_cache: str | None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chat and self.prompt_ids is not None:
            raise UsageError("--chat wraps text: it goes with --prompt or --prompts, not with --prompt-ids")
        if self.no_thinking and not self.chat:
            raise UsageError("--no-thinking needs --chat")
        path = self.dump_logits
        if path and (self.prompts or path.suffix != ".npz"):
            raise UsageError("--dump-logits takes one prompt, and an .npz file")
        if path:
            require_writable(path)

    def opened(self) -> Checkpoint:
        """The checkpoint, none of whose weights has been read yet."""
        from runtime.cli.opening import opened_checkpoint

        return opened_checkpoint(self.checkpoint)

    def asked(self, opened: Checkpoint, words: Words) -> tuple[list[Prompt], Answers]:
        """The words as the checkpoint's tokens, and what prints its own."""
        from model.tokenizer import ChatTemplate, Tokenizer

        path, tokenizer = opened.path, None
        if not isinstance(words, tuple) or (path / "tokenizer.json").exists():
            tokenizer = Tokenizer.load(path)
        if isinstance(words, tuple):
            encoded = [words]
        else:
            assert tokenizer is not None
            if self.chat:
                template, thinking = ChatTemplate.load(path), not self.no_thinking
                chats = [[{"role": "user", "content": text}] for text in words]
                words = template.render_each(chats, enable_thinking=thinking)
            encoded = map(tuple, tokenizer.encode_each(words, add_special_tokens=not self.chat))
        ends = {*opened.config.eos_token_ids, *(tokenizer.stop_token_ids if tokenizer else ())}
        requests = self.requests(encoded, ends, self.dump_logits is not None)
        embedded = "[the embedded model knows some made-up text; --checkpoint DIR runs another]"
        return requests, self.answers(tokenizer, embedded if self.checkpoint is None else None)


def _parse_ids(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--prompt-ids takes whole numbers separated by commas, not {shortened(repr(text))}") from None
