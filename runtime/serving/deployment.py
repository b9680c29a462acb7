"""What is simulated: servers, how a load is spread over them, and what they can hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, get_args

from foundation.errors import CapacityError
from runtime.deployment.engines.engine import RouterPolicy
from runtime.serving.errors import WorkloadError
from runtime.serving.pricing import StepPricer
from runtime.serving.request import Request
from runtime.serving.speculation import Speculation
from runtime.serving.tiers import CacheTier

if TYPE_CHECKING:
    from runtime.deployment.engines import Engine
    from runtime.serving.rank import Rank


@dataclass(frozen=True)
class Deployment:
    """Servers that each take requests from prompt to last token.

    pricer: prices a step of one rank. pool_tokens: KV capacity of one rank, tokens.
    devices: accelerators of the whole deployment. replicas: independent servers.
    ranks: attention-data-parallel ranks in each replica, stepping in lock-step.
    router: how a request finds its rank, over all replicas; see `routing`.
    tiers: memory below the devices' in which a rank keeps prompts, nearest first. Steps that are carried out use none.
    assumed: what nobody gave, and what was taken for it, in words, beside what prices rest on.
    """

    engine: Engine
    pricer: StepPricer
    pool_tokens: int
    devices: int = 1
    replicas: int = 1
    ranks: int = 1
    router: RouterPolicy = "round-robin"
    speculation: Speculation | None = None
    assumed: frozenset[str] = frozenset()
    tiers: tuple[CacheTier, ...] = ()

    def __post_init__(self) -> None:
        for key in ("devices", "replicas", "ranks"):
            if getattr(self, key) < 1:
                raise CapacityError(f"{key} = {getattr(self, key)}: a deployment needs at least one")
        if self.router not in get_args(RouterPolicy):
            raise WorkloadError(f"unknown router {self.router!r}: use one of {', '.join(get_args(RouterPolicy))}")


@dataclass(frozen=True)
class Disaggregated:
    """Prefill servers that send each prompt's cache to decode servers.

    A transfer takes link_latency_seconds + prompt x kv_bytes_per_token / link_bandwidth_bytes_per_s. Those
    leaving one prefill rank follow one another. The client sees the first token when decoding admits
    the request. link_assumed: as `assumed`, of the link.
    """

    prefill: Deployment
    decode: Deployment
    kv_bytes_per_token: float
    link_bandwidth_bytes_per_s: float
    link_latency_seconds: float = 0.0
    link_assumed: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if not self.link_bandwidth_bytes_per_s > 0:
            raise CapacityError(f"KV link bandwidth {self.link_bandwidth_bytes_per_s} B/s: give one above zero")
        if self.kv_bytes_per_token < 0 or self.link_latency_seconds < 0:
            raise CapacityError("KV bytes per token and link latency cannot be negative")

    @property
    def assumed(self) -> frozenset[str]:
        return self.prefill.assumed | self.decode.assumed | self.link_assumed

    @property
    def prefilling(self) -> Deployment:
        """The prefill servers, admitting by what a prompt needs: answers grow elsewhere."""
        return replace(self.prefill, engine=replace(self.prefill.engine, admission="prompt"), speculation=None)


def check_capacity(requests: Sequence[Request], roles: Sequence[Deployment], ranks: Sequence[Rank]) -> None:
    """Raises CapacityError for the first request that some role could never serve.

    roles, ranks: the deployments a request passes through, and a rank of each. Only the last of them generates the
    answer, and its last step may write behind it.
    """
    for role, rank in zip(roles, ranks, strict=True):
        pool, drafts = rank.pool, rank.writes - 1
        uncut = role.engine.policy == "mixed" and not role.engine.chunked_prefill_tokens
        for request in requests:
            answer = request.output_tokens + drafts if role is roles[-1] else 1
            need = request.prompt_tokens + answer
            if pool.pages_for(need) > pool.total:
                raise CapacityError(
                    f"request {request.id} needs {need} tokens of KV cache (prompt {request.prompt_tokens} + "
                    f"{answer}) but a rank's pool holds {pool.tokens}: shorten it or enlarge the pool"
                )
            if uncut and request.prompt_tokens > role.engine.max_step_tokens:
                raise CapacityError(
                    f"request {request.id} has a prompt of {request.prompt_tokens} tokens, which "
                    f"{role.engine.name} does not chunk: raise its max_step_tokens"
                )
