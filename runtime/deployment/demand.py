"""What is asked of a deployment: the lengths of its requests, their load, and the targets that its answers keep."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

from runtime.deployment.engines.engine import RouterPolicy

Objective = Literal["throughput", "latency", "min-devices"]
Percentile = Literal[50, 90, 99]
Figures = Mapping[str, float | None]
"""Of one quantity: "mean", "p50", "p90" and "p99"."""
LENGTH_MOST = 8.0
"""Times their mean at which lognormal lengths are cut where nobody says: beyond are 0.2 % of them at cv 1."""


@dataclasses.dataclass(frozen=True)
class Demand:
    """What is asked of a plan: request lengths in tokens (uniform in [length_ratio x L, L]), load, targets.

    length_cv: lengths are lognormal instead, isl and osl their means, with that coefficient of variation, and cut at
    `length_most` times the mean. histogram: or they are these (input, output, weight), isl and osl their longest.
    shared_prefix: share of each prompt's tokens that the requests of its group begin with, one of `prefix_groups`.
    turns, think_s: requests are turns of conversations, which `concurrency` clients hold, or which begin at rate /
    turns a second; a prompt is the conversation so far and isl new tokens, sent think_s seconds after the last answer.

    concurrency: requests in flight (closed loop), or rate: requests a second (open loop); one of them. ttft_ms and
    tpot_ms bound the means over requests, or with percentile that percentile of them. objective: what is made best
    among the plans that meet them.
    """

    isl: int = 8192
    osl: int = 1024
    length_ratio: float = 0.8
    concurrency: int | None = None
    rate: float | None = None
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    objective: Objective = "throughput"
    percentile: Percentile | None = None
    length_cv: float | None = None
    length_most: float = LENGTH_MOST
    histogram: tuple[tuple[int, int, float], ...] = ()
    shared_prefix: float = 0.0
    prefix_groups: int = 1
    turns: int = 1
    think_s: float = 0.0

    @property
    def shares(self) -> bool:
        """Whether prompts begin like others before them."""
        return self.shared_prefix > 0 or self.turns > 1

    def groups_each(self, shares: int, router: RouterPolicy) -> int:
        """Groups that the prompts on each of so many equal shares of the deployment are of: its own behind a
        cache-aware router, all of them behind another."""
        return math.ceil(self.prefix_groups / (shares if router == "cache-aware" else 1))

    @property
    def means(self) -> tuple[float, float]:
        """New input tokens and output tokens of a request, on average."""
        if self.histogram:
            weight = sum(row[2] for row in self.histogram)
            mean_in, mean_out = (sum(row[i] * row[2] for row in self.histogram) / weight for i in (0, 1))
            return mean_in, mean_out
        if self.length_cv is not None:
            return float(self.isl), float(self.osl)
        return self.isl * (1 + self.length_ratio) / 2, max(self.osl * (1 + self.length_ratio) / 2, 1.0)

    @property
    def spans(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """The least and the most new input tokens, and output tokens, of a request."""
        if self.histogram:
            ins, outs = [row[0] for row in self.histogram], [row[1] for row in self.histogram]
            return (min(ins), max(ins)), (min(outs), max(outs))
        if self.length_cv is not None:
            return (1, max(1, int(self.isl * self.length_most))), (1, max(1, int(self.osl * self.length_most)))
        return length_range(self.isl, self.length_ratio), length_range(self.osl, self.length_ratio)

    @property
    def longest(self) -> tuple[int, int]:
        """(prompt, answer) of the longest request, by their sum; of a conversation's last turn, where the ones before
        it are isl and osl long (with a histogram, as long as usual)."""
        if self.histogram:
            most_in, most_out = max((row[:2] for row in self.histogram), key=sum)
        else:
            (_, most_in), (_, most_out) = self.spans
        if self.turns == 1:
            return most_in, most_out
        before = (self.isl, self.osl) if not self.histogram else tuple(map(math.ceil, self.means))
        return most_in + (self.turns - 1) * sum(before), most_out

    @property
    def prompt_means(self) -> tuple[float, float]:
        """Tokens of a prompt, and those of them that were computed before where everything is kept, on average."""
        new, answer = self.means
        held = (self.turns - 1) / 2 * (new + answer)
        return held + new, held + self.shared_prefix * new / self.turns

    @property
    def habits(self) -> list[str]:
        """What requests have to do with one another, in words."""
        whose = "all" if self.prefix_groups == 1 else f"one of {self.prefix_groups:,} groups"
        found = [f"{self.shared_prefix:.4g} of each prompt shared by {whose}"] if self.shared_prefix else []
        if self.turns > 1:
            found.append(f"conversations of {self.turns:,} turns, {self.think_s:g} s between them")
        return found

    @property
    def statistic(self) -> str:
        """What the targets bound, as reports name it: "mean", "p50", "p90" or "p99"."""
        return "mean" if self.percentile is None else f"p{self.percentile}"

    def wants(self) -> list[str]:
        """What is asked beside the load, in words."""
        which = "" if self.percentile is None else f"{self.statistic} "
        named = (("TTFT", self.ttft_ms), ("TPOT", self.tpot_ms))
        return [f"{which}{name} up to {target:,.4g} ms" for name, target in named if target is not None]

    def over(self, ttft_ms: float | None, tpot_ms: float | None) -> float:
        """By how much the targets are missed by these figures: the sum of the relative excesses."""
        pairs = ((self.ttft_ms, ttft_ms), (self.tpot_ms, tpot_ms))
        return sum(max((got or 0.0) / target - 1, 0.0) for target, got in pairs if target is not None)

    @property
    def lengths(self) -> str:
        """The lengths of requests, in words."""
        (a, b), (c, d) = self.spans
        spans = f"{_span(a, b)} tokens in and {_span(c, d)} out"
        if self.histogram or self.length_cv is not None:
            mean_in, mean_out = self.means
            kind = f"{len(self.histogram):,} kinds" if self.histogram else f"lognormal, cv {self.length_cv:g}"
            spans += f", on average {mean_in:,.0f} and {mean_out:,.0f} ({kind})"
        return ", ".join([spans, *self.habits])

    @property
    def load(self) -> str:
        """How much is asked, in words."""
        if self.rate is not None:
            return f"{self.rate:g} requests/s"
        if self.concurrency is None:
            return "its own load"
        return f"{self.concurrency:,} {'requests in flight' if self.turns == 1 else 'clients'}"

    def missed(self, ttft_ms: Figures, tpot_ms: Figures, served_per_s: float, kept_up: bool) -> list[str]:
        """Which of what was asked is missed, in words, and by how much: from the statistics, and the requests served a
        second. kept_up: the backlog does not grow."""
        found = []
        if self.rate is not None and not kept_up:
            found.append(f"{self.rate:g} requests/s asked, {served_per_s:.3g} served, and the backlog grows")
        which = "" if self.percentile is None else f"{self.statistic} "
        for name, target, stats in (("TTFT", self.ttft_ms, ttft_ms), ("TPOT", self.tpot_ms, tpot_ms)):
            got = stats[self.statistic]
            if target is not None and got is not None and got > target:
                found.append(f"{which}{name} {got:,.1f} ms, {target:,.1f} asked")
        return found


def length_range(tokens: int, ratio: float) -> tuple[int, int]:
    """The shortest and the longest of lengths drawn uniformly from [ratio x tokens, tokens]."""
    return max(1, int(tokens * ratio)), tokens


def _span(least: int, most: int) -> str:
    return f"{most:,}" if least == most else f"{least:,} to {most:,}"
