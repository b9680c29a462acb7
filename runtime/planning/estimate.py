"""The steady state of a replica, from its prices: what a load will see, without playing it.

Symbols, per rank: b requests in flight; D(b) seconds of a decode step; P seconds that a prompt keeps a step
from decoding; mu = b / osl * accepted, prompts that begin for each decode step (one for each answer that ends);
r ranks that step together. A prompt on one rank holds up all of them, unless others begin theirs in the same
step, so that prompts cost

    rounds = min(r^0.7 * mu, mu + sqrt(2 * mu * ln r))    (r: all alone, r^0: all together, r^0.7: as the simulator
                                                           has them; or the expected most of r Poisson draws)

P each decode step, and a token takes (D + rounds * P) / accepted. Requests beyond what the cache or the engine's
limit holds wait. Within 10 % of the simulator in TPOT up to 4 ranks, 25 % beyond; it has the last word.
"""

from __future__ import annotations

import dataclasses
import math
from functools import cache

import numpy as np

from runtime.deployment.demand import Demand
from runtime.planning.options import Option
from runtime.planning.predict import closed_loop_requests
from runtime.serving.pricing import NO_CONTEXTS, step_seconds, step_shape
from runtime.simulation.build import PriceTables, pricer_of, speculation, tiers_of

_LONGEST_SWEEP = 4096
ALIGNED = 0.7
"""Power of the ranks in the rounds of prompts, fitted to simulations of 2 to 8 ranks with 8 to 80 requests."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A steady state of a whole deployment. concurrency: requests in flight. tpot_seconds: 0 where answers have one
    token. running_limit: requests a rank takes up at a time, 0 for as many as it holds."""

    concurrency: int
    requests_per_s: float
    output_tokens_per_s: float
    ttft_seconds: float
    tpot_seconds: float
    running_limit: int = 0

    def e2e_seconds(self, demand: Demand) -> float:
        return self.ttft_seconds + self.tpot_seconds * max(demand.means[1] - 1, 0)

    def misses(self, demand: Demand) -> float:
        """By how much the targets are missed: 0 where they are met, else the sum of relative excesses."""
        over = demand.over(self.ttft_seconds * 1e3, self.tpot_seconds * 1e3)
        if demand.rate is not None:  # a load that is not kept up with is a miss too
            over += max(1 - self.requests_per_s / demand.rate - 1e-6, 0.0)
        return over


class OptionPrices:
    """The prices of one option under one demand."""

    def __init__(self, option: Option, demand: Demand, tables: PriceTables):
        self.option, self.demand = option, demand
        self.engine = option.spec.engine
        self.pricer = pricer_of(option.spec, tables)
        made = speculation(option.spec.drafts, acceptance=option.spec.acceptance)
        self.query_tokens = made.query_tokens if made else 1
        self.accepted = made.mean_tokens if made else 1.0
        self.prompt, found = demand.prompt_means
        self.output = demand.means[1]
        self.ranks = option.layout.dp
        shared = demand.shared_prefix * demand.means[0]
        groups = demand.groups_each(option.spec.replicas, self.engine.router) * shared
        kept = self.engine.prefix_cache and groups + self.prompt + self.output - shared <= option.pool_tokens
        below = max((tier.tokens for tier in tiers_of(option.spec)), default=0)
        fetched = self.engine.prefix_cache and demand.shares and groups + self.prompt + self.output - shared <= below
        self.cached = min(found, self.prompt - 1) if kept or fetched else 0.0
        """Tokens of a prompt that the prefix cache has: everything, where all groups fit it beside a request, on the
        devices or below them."""
        self._kept_once = (groups, shared if demand.turns == 1 else shared / demand.turns) if kept else (0.0, 0.0)
        self.decode_seconds = cache(self._decode_seconds)
        self.prefill_seconds = cache(self._prefill_seconds)

    @property
    def holds(self) -> int:
        """Requests a rank has in service at most: by its cache, at their mean length, and by the engine's limit."""
        of_groups, shared = self._kept_once
        need = self.prompt + self.output - shared
        return max(1, min(int((self.option.pool_tokens - of_groups) / need), self.engine.max_running_requests))

    @property
    def front_seconds(self) -> float:
        """From the client to the scheduler and back, and tokenising."""
        engine = self.engine
        return engine.front_seconds(self.prompt) + engine.request_delay_seconds + engine.response_seconds

    def _decode_seconds(self, sequences: int) -> float:
        """A decode step of `sequences` requests at their mean context."""
        context = self.prompt + self.output / 2
        shape = step_shape(self.engine, np.full(sequences, context), self.query_tokens)
        return step_seconds(self.engine, self.pricer.seconds(shape), shape)

    def _prefill_seconds(self, decoding: int) -> tuple[float, float]:
        """(seconds until a prompt is computed, seconds by which it delays `decoding` requests)."""
        engine, done = self.engine, int(self.cached)
        budget = engine.chunked_prefill_tokens or engine.max_step_tokens
        mixed = engine.policy == "mixed" and decoding > 0
        if mixed:
            budget = max(1, min(budget, engine.max_step_tokens - decoding * self.query_tokens))
        contexts = np.full(decoding if mixed else 0, self.prompt + self.output / 2)
        seconds = extra = 0.0
        while done < self.prompt:
            chunk = int(math.ceil(min(budget, self.prompt - done)))
            shape = step_shape(engine, contexts, self.query_tokens, [(chunk, done)], int(done == int(self.cached)))
            took = step_seconds(engine, self.pricer.seconds(shape), shape)
            seconds += took
            extra += took - self.decode_seconds(decoding) if mixed else took
            done += chunk
        return seconds, max(extra, 0.0)

    def serving(self, in_flight: float, replicas: int, running_limit: int = 0) -> Estimate:
        """The steady state with `in_flight` requests in a closed loop over all replicas."""
        places = replicas * self.ranks
        if self.demand.osl == 1:
            return self._prompts_only(in_flight, places)
        b, holds = in_flight / places, min(self.holds, running_limit or self.holds)
        running = max(1, min(math.ceil(b), holds))
        together = max(1, min(self.ranks, math.ceil(in_flight / replicas)))
        decode = self.decode_seconds(running)
        first, delay = self.prefill_seconds(running if self.engine.policy == "mixed" else 0)
        mu = running * self.accepted / self.output
        rounds = min(together**ALIGNED * mu, mu + math.sqrt(2 * mu * math.log(together)) if together > 1 else mu)
        step = decode + rounds * delay
        share = rounds * delay / step
        tpot = step / self.accepted
        wait = min(share / max(1 - share, 0.05) / 2 * first, b * first)
        ttft = self.front_seconds + first + wait + decode / 2
        service = ttft + self.output * tpot
        rate = min(in_flight, places * holds) / service
        queue = in_flight / rate - service
        opening = self._opening(running, places)
        return Estimate(round(in_flight), rate, rate * self.output, ttft + queue + opening, tpot, running_limit)

    def _opening(self, running: int, places: int) -> float:
        """By how much the burst in which the clients of a closed loop begin delays the mean request: their prompts, of
        `running` a rank, are computed one after another, as many tokens a step as it takes."""
        clients = self.demand.concurrency
        if clients is None or running < 2:
            return 0.0
        engine, new = self.engine, max(1, math.ceil(self.prompt - self.cached))
        budget = max(1, min(engine.chunked_prefill_tokens or new, engine.max_step_tokens))
        chunk, together = min(new, budget), min(running, max(1, budget // new))
        shape = step_shape(
            engine, NO_CONTEXTS, 1, [(chunk, int(self.cached) + (new - chunk) // 2)] * together, together
        )
        each = step_seconds(engine, self.pricer.seconds(shape), shape) * new / (together * chunk)
        sharing = 1 if engine.front_end_per_rank else self.ranks
        front, tokens = sharing * engine.front_seconds(0), sharing * self.prompt * engine.tokenize_seconds_per_token
        # twice: all wait for the last
        behind = 2 * front + max(tokens, each) if engine.front_end_gathers else max(front + tokens, each)
        here = math.ceil(clients * self.ranks / places)
        share = min(1.0, here / closed_loop_requests(self.demand, here))
        return share * behind * (running - 1) / 2

    def _prompts_only(self, in_flight: float, places: int) -> Estimate:
        """Where answers have one token, which prefilling makes: prompts follow one another, and nothing decodes."""
        alone, each = self.prefill_seconds(0)[0], max(in_flight / places, 1.0)
        took = max(self.front_seconds + alone, each * alone)  # while one is at the front end, others are computed
        rate = in_flight / took
        return Estimate(max(1, round(in_flight)), rate, rate * self.output, took, 0.0)

    def at_rate(self, rate: float, replicas: int) -> Estimate:
        """The steady state at `rate` requests a second; the most it can do where that is less."""
        low, high = 1.0, float(self.holds * self.ranks * replicas)
        best = self.serving(high, replicas)
        if best.requests_per_s < rate:
            return best
        for _ in range(24):
            middle = math.sqrt(low * high)
            found = self.serving(middle, replicas)
            low, high = (middle, high) if found.requests_per_s < rate else (low, middle)
        found = self.serving(high, replicas)
        return dataclasses.replace(found, requests_per_s=rate, output_tokens_per_s=rate * self.output)

    def sweep(self, replicas: int, fine: bool = False) -> list[Estimate]:
        """Steady states over loads: a request a rank and doublings (fine: four steps to one), up to what the cache
        holds."""
        if self.demand.osl == 1:  # one computed a rank, another behind it, and those at the front end; more only wait
            busy = 1 + math.ceil((self.front_seconds + self.prefill_seconds(0)[0]) / self.prefill_seconds(0)[0])
            return [self.serving(float(count * self.ranks * replicas), replicas) for count in (1, busy)]
        counts = limits(self.holds) if fine else [2**i for i in range(13) if 2**i < self.holds]
        counts = [count for count in (*counts, self.holds) if count <= _LONGEST_SWEEP]
        return [self.serving(float(count * self.ranks * replicas), replicas) for count in counts]

    def _in_flight(self, clients: int, replicas: int) -> float:
        """Requests in flight of so many clients, who think between the turns of a conversation."""
        idle = self.demand.think_s * (1 - 1 / self.demand.turns)
        load = float(clients)
        for _ in range(12 if idle else 0):  # more in flight take longer, so this swings: half a step each time
            busy = self.serving(load, replicas).e2e_seconds(self.demand)
            load = (load + max(1.0, clients * busy / (busy + idle))) / 2
        return load

    def operating_points(self, replicas: int) -> list[Estimate]:
        """Where the deployment may run under its demand: one point where the load is given, else a sweep."""
        demand = self.demand
        if demand.rate is not None:
            return [self.at_rate(demand.rate, replicas)]
        if demand.concurrency is not None:
            load = self._in_flight(demand.concurrency, replicas)
            found = [self.serving(load, replicas)]
            if found[0].misses(demand) and demand.tpot_ms is not None:
                most = min(self.holds, math.ceil(load / replicas / self.ranks))
                found += [self.serving(load, replicas, n) for n in limits(most)]
            return found
        if demand.objective == "throughput":
            return self.sweep(replicas, fine=demand.ttft_ms is not None or demand.tpot_ms is not None)
        return [self.serving(1.0, replicas)]


def limits(most: int) -> list[int]:
    """Running limits to try below `most`: four to the octave."""
    return sorted({round(2 ** (i / 4)) for i in range(4 * 12) if round(2 ** (i / 4)) < most})


def score(estimate: Estimate, demand: Demand) -> tuple[float, float]:
    """Less is better: targets first, then the objective. Under a rate all who keep up serve the same, and the soonest
    answer is best: it leaves the most room."""
    if demand.objective == "latency" or demand.rate is not None:
        return estimate.misses(demand), estimate.e2e_seconds(demand)
    return estimate.misses(demand), -estimate.output_tokens_per_s
