"""Prompts in, tokens out, on one device: the scheduler of `runtime/serving/` by the wall clock, over programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from foundation.errors import CapacityError
from model.config import ModelConfig
from runtime.deployment.engines import Engine, load
from runtime.execution.local.executor import LocalExecutor
from runtime.execution.local.programs import Programs
from runtime.execution.local.request import Completion, OnToken, Prompt, check_request
from runtime.execution.serve_all import serve_all, without_times
from runtime.serving import Deployment, Speculation
from runtime.serving.executor import refuse
from runtime.serving.kv_pool import KvPool
from runtime.serving.pricing import UNPRICED


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Whose scheduler serves, and what is otherwise than in its description. Sizes in tokens; None: as described.

    engine: a name or TOML file, as of `glm5 simulate`. prefill_chunk: prompt tokens of a step. drafts: speculative
    tokens a step. kv: what caches are kept in, "bf16" or "fp8" (`load.rows_for`); None: as they are computed.

    The `least_` sizes are the smallest gears: shapes are padded up to them, then to powers of two. Larger
    ones mean fewer programs to compile and more padding to compute.
    """

    engine: str = "glm5"
    page_size: int | None = None
    pool_tokens: int = 8192
    max_running: int | None = None
    prefill_chunk: int | None = None
    drafts: int = 0
    least_batch: int = 1
    least_chunk: int = 16
    least_context: int = 128
    prefix_cache: bool | None = None
    kv: str | None = None

    @property
    def described(self) -> Engine:
        """The engine, its times left out: here steps take what they take. Raises `EngineError`."""
        given = {
            "page_tokens": self.page_size,
            "max_running_requests": self.max_running,
            "chunked_prefill_tokens": self.prefill_chunk,
            "prefix_cache": self.prefix_cache,
        }
        engine = load(self.engine, {name: value for name, value in given.items() if value is not None})
        return dataclasses.replace(
            without_times(engine),
            # prompts alone in a step are cut to what a step takes; beside answers, they fill what those leave
            max_step_tokens=engine.chunked_prefill_tokens
            if self.prefill_chunk and engine.policy == "prefill-first"
            else engine.max_step_tokens,
        )

    @property
    def pages(self) -> int:
        return -(-self.pool_tokens // self.described.page_tokens)


class LocalEngine:
    """Serves requests with `programs`; single-threaded, one `generate` call at a time.

    steps, preemptions: so far. pool: of the last call. Raises `UsageError` for an engine whose steps the programs
    cannot carry out.
    """

    def __init__(self, cfg: ModelConfig, programs: Programs, config: EngineConfig):
        self.cfg, self.programs, self.config = cfg, programs, config
        self.executor = LocalExecutor(programs, config.least_batch, config.least_chunk, config.least_context)
        self.deployment = Deployment(
            config.described,
            UNPRICED,
            config.pages * config.described.page_tokens,
            speculation=Speculation((0.5,) * config.drafts) if config.drafts else None,
        )
        refuse(self.deployment, self.executor)
        self.preemptions = 0
        self.steps = 0
        self.pool: KvPool | None = None

    def validate(self, request: Prompt) -> None:
        """Raises `UsageError` or `CapacityError` for a request that can never be served."""
        check_request(request, self.cfg)
        prompt, reach = len(request.prompt_ids), self.reach
        if prompt + request.max_tokens + reach > self.deployment.pool_tokens:
            drafts = f" + {reach} of drafts" if reach else ""
            raise CapacityError(
                f"prompt ({prompt} tokens) + max-tokens ({request.max_tokens}){drafts} exceeds the page "
                f"pool's {self.deployment.pool_tokens} tokens; shorten one or raise --pool-tokens"
            )

    @property
    def reach(self) -> int:
        """Tokens beyond a request's own that a step may write."""
        return max(0, 2 * self.config.drafts - 1)

    def generate(self, requests: Sequence[Prompt], on_token: OnToken = lambda i, t: None) -> list[Completion]:
        """Serves all requests; completions in the order of the requests."""
        for request in requests:
            self.validate(request)
        found, sent, loop = serve_all(
            requests, self.deployment, self.executor, lambda: self.programs.compile_s, on_token, self._observe
        )
        self.preemptions += sum(request.preemptions for request in sent)
        self.pool = loop.ranks[0].pool
        return found

    def _observe(self, *step: object) -> None:
        self.steps += 1
