"""What a run prints: text as it comes, or JSON; and the logits it stores."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foundation.writing import replacing

if TYPE_CHECKING:
    from model.tokenizer import Tokenizer
    from runtime.execution.local.request import Completion
    from runtime.execution.package.generate import Text


class Answers:
    """Prints what came of the prompts: `streaming` as text with a line about it on stderr, otherwise as JSON objects.

    many: a line an object. tokenizer: None prints ids. note: a last line on stderr.
    """

    def __init__(
        self, backend: str, tokenizer: Tokenizer | Text | None, streaming: bool, many: bool, note: str | None = None
    ):
        self._backend, self._tokenizer, self._streaming, self._many = backend, tokenizer, streaming, many
        self._note = note
        self._stream = tokenizer.stream() if tokenizer and streaming else None

    def token(self, _: int, token: int) -> None:
        """Told of each new token, as `OnToken`."""
        if self._streaming:
            print(self._stream.put(token) if self._stream else f"{token} ", end="", flush=True)

    def give(
        self,
        completions: Sequence[Completion],
        load_s: float,
        compile_s: float,
        more: Mapping[str, Any] | None = None,
        logits: Path | None = None,
    ) -> None:
        """The end of a run. more: fields of the JSON objects beside those that every run has. logits: the file for
        those of the first prompt."""
        if self._streaming:
            print(self._stream.flush() if self._stream else "")
        if logits:
            _save_logits(logits, completions[0])
        for completion in completions:
            result = {**self._result(completion, load_s, compile_s), **(more or {})}
            if self._streaming:
                _summary(result)
                if self._note:
                    print(self._note, file=sys.stderr)
            else:
                print(json.dumps(result, indent=None if self._many else 2, ensure_ascii=False), flush=True)

    def _result(self, completion: Completion, load_s: float, compile_s: float) -> dict[str, Any]:
        decoded = len(completion.token_ids) - 1
        return {
            "backend": self._backend,
            "prompt_ids": list(completion.prompt_ids),
            "token_ids": list(completion.token_ids),
            "text": self._tokenizer.decode(list(completion.token_ids)) if self._tokenizer else None,
            "finish_reason": completion.finish_reason,
            "timings_s": {
                "load": load_s,
                "compile": compile_s,
                "ttft": completion.ttft_s,
                "decode": completion.decode_s,
                "tpot": completion.decode_s / decoded if decoded else None,
            },
            "accept_length": completion.accept_length,
        }


def _summary(result: dict[str, Any]) -> None:
    timings = result["timings_s"]
    rate = f", then {1 / timings['tpot']:.1f} tok/s" if timings["tpot"] else ""
    accept = f", {result['accept_length']:.2f} tokens a step" if result["accept_length"] else ""
    digits = 4 if "clock" in result else 2
    if "clock" in result:
        print(f"[{result['plan']}; clock: {result['clock']}]", file=sys.stderr)
    print(
        f"[{result['backend']}: {len(result['prompt_ids'])} + {len(result['token_ids'])} tokens, "
        f"{result['finish_reason']}; first token after {timings['ttft']:.{digits}f} s{rate}{accept}; "
        f"compiling took {timings['compile']:.1f} s]",
        file=sys.stderr,
    )


def _save_logits(path: Path, completion: Completion) -> None:
    import numpy as np

    assert completion.logits is not None
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, logits=completion.logits)
