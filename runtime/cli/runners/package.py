"""`glm5 run --artifact`: an exported package alone. Nothing of the model's code is imported."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from foundation.errors import UsageError
from runtime.cli.runners.asked import RunMode


@dataclasses.dataclass(frozen=True)
class PackageRun(RunMode):
    """What `glm5 export` wrote, in a runtime that reads its format."""

    artifact: Path
    trust_package: bool

    @classmethod
    def why_not(cls, name: str, backend: str) -> str:
        if name == "prefill_chunk":
            return "does not go with --artifact: the package has its chunks from `glm5 export --chunk`; leave it out"
        return "does not go with --artifact: the package has been made without it; leave it out"

    def run(self) -> None:
        from runtime.execution.package.generate import Package

        words, started = self.words(), time.perf_counter()
        package = Package(self.artifact, self.backend, trusted=self.trust_package)
        if isinstance(words, tuple):
            encoded = [words]
        elif package.text is None:
            raise UsageError(f"{self.artifact}: holds no tokenizer; give token ids: --prompt-ids")
        else:
            encoded = map(tuple, package.text.encode_each(words))
        requests = self.requests(encoded, package.stop_ids)
        load_s, answers = time.perf_counter() - started, self.answers(package.text)
        completions = package.generate(requests, answers.token)
        answers.give(completions, load_s, package.compile_s)
