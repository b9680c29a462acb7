"""What goes into a rank's next step: the policies and admission rules that engines differ by.

`plan` is called before every step. Two policies:

    prefill-first (SGLang)          while prompts can be admitted, steps are prompts only
    mixed (vLLM, TensorRT-LLM)      every slot decodes, prompts fill what is left of the token budget

A request's pages for its whole prompt are taken when it is admitted; where an engine asks for those of a chunk only
("chunk" admission), they are taken chunk by chunk, and a prompt that finds none is put back.
"""

from __future__ import annotations

import math

import numpy as np

from runtime.serving.rank import Rank, StepPlan
from runtime.serving.request import Request


def plan(rank: Rank, known_at: float, now: float) -> StepPlan:
    """The rank's next step, made at `now` knowing the requests that were queued by `known_at`.

    Admits and preempts as the engine's policy says; an empty plan means that there is nothing to do.
    """
    if rank.engine.policy == "prefill-first":
        return _prefill_first(rank, known_at, now)
    return _mixed(rank, known_at, now)


def _prefill_first(rank: Rank, known_at: float, now: float) -> StepPlan:
    """SGLang: fill a prefill batch up to the chunk size; decode only when there is none to run."""
    engine, page = rank.engine, rank.pool.page_tokens
    chunk_left = float(engine.chunked_prefill_tokens or math.inf)
    step_left = engine.max_step_tokens
    joining: list[Request] = []  # their prompts end in this batch, their answers begin
    step = StepPlan()

    def add(request: Request, tokens: int) -> None:
        nonlocal chunk_left, step_left
        step.chunks.append((request, tokens, request.computed))
        chunk_left -= -(-tokens // page) * page
        step_left -= -(-tokens // page) * page
        if request.computed + tokens == request.target:
            joining.append(request)

    for request in rank.prefilling:
        if request.ready_at <= now and chunk_left > 0:
            add(request, int(min(request.target - request.computed, chunk_left)))
    while chunk_left > 0 and step_left > 0 and (request := _head(rank, known_at)):
        rank.blocked = _refusal(rank, request, joining)
        if rank.blocked:
            break
        tokens = 0 if request.kv_ready else request.target - rank.pool.cached_tokens(request)
        if step.chunks and -(-tokens // page) * page >= step_left:
            break
        if -(-tokens // page) * page > chunk_left:
            whole = int(chunk_left) // page * page
            if not whole and step.chunks:
                break
            tokens = min(tokens, max(whole, int(min(chunk_left, page))))
        rank.admit(request, now)
        if not request.kv_ready and request.ready_at <= now:
            add(request, tokens)
    if not step.chunks and rank.running:
        _make_room(rank)
        step.decode = True
    return step


def _mixed(rank: Rank, known_at: float, now: float) -> StepPlan:
    """vLLM and in-flight batching: decode everything, then prompts in order, within one token budget."""
    engine = rank.engine
    preempted = _make_room(rank)
    rank.grow(1)
    step = StepPlan()
    budget = engine.max_step_tokens - len(rank.running) * rank.query_tokens
    longest = engine.chunked_prefill_tokens or math.inf
    by_chunk = engine.admission == "chunk"
    for request in list(rank.prefilling):
        if request.ready_at > now:
            continue
        tokens = int(min(request.target - request.computed, longest, budget))
        if tokens <= 0 or request not in rank.prefilling:
            break
        if by_chunk and not rank.pool.extend(request, request.computed + tokens):
            preempted = True
            if not _makes_room_for(rank, request, request.computed + tokens):
                break
        step.chunks.append((request, tokens, request.computed))
        budget -= tokens
    while not preempted and budget > 0 and (request := _head(rank, known_at)):
        tokens = 0 if request.kv_ready else request.target - rank.pool.cached_tokens(request)
        if engine.chunked_prefill_tokens:
            tokens = int(min(tokens, longest, budget))
        elif tokens > budget and (step.chunks or rank.running):
            break  # uncut prompts wait for a step with room; a lone one may exceed the budget
        first = tokens if by_chunk and not request.kv_ready else None
        rank.blocked = _refusal(rank, request, [], first)
        if rank.blocked:
            break
        rank.admit(request, now, first)
        if request.kv_ready:
            budget -= rank.query_tokens
        elif request.ready_at <= now:
            step.chunks.append((request, tokens, request.computed))
            budget -= tokens
    step.decode = bool(rank.running)
    if _make_room(rank):  # for caches that came from elsewhere and just joined
        step.chunks = [chunk for chunk in step.chunks if chunk[0] in rank.prefilling]
        step.decode = bool(rank.running)
    return step


def _head(rank: Rank, known_at: float) -> Request | None:
    """The first waiting request, if the scheduler may look at it now."""
    if rank.blocked or not rank.waiting or rank.waiting[0].visible_at > known_at:
        return None
    return rank.waiting[0]


def _refusal(rank: Rank, request: Request, joining: list[Request], first: int | None = None) -> str:
    """Why the request cannot be admitted now: "max-running", "kv-pool", or "" if it can.

    joining: requests whose prompts end in the batch being made. first: tokens of the prompt that have to fit; None for
    all of them.
    """
    if rank.in_service >= rank.engine.max_running_requests:
        return "max-running"
    missing = rank.pool.missing_pages(request, first)
    if missing > rank.pool.available:
        return "kv-pool"
    if not rank.in_service and not rank.handed_off:
        return ""  # alone, it fits: every engine serves it rather than nothing
    if rank.engine.admission == "max-length":
        full = rank.pool.pages_for(request.prompt_tokens + request.output_tokens)
        return "" if rank.committed + full <= rank.pool.total else "kv-pool"
    if rank.engine.admission in ("prompt", "chunk"):
        spare = int(rank.engine.watermark_fraction * rank.pool.total)
        return "" if missing + spare <= rank.pool.available else "kv-pool"
    fits = _estimate_fits if rank.engine.prefix_cache else _lookahead_fits
    return "" if fits(rank, request, missing * rank.pool.page_tokens, joining) else "kv-pool"


def _estimate_fits(rank: Rank, request: Request, missing_tokens: int, joining: list[Request]) -> bool:
    """SGLang's PrefillAdder.add_one_req: the whole request against the pool less what is expected to grow.

    expected growth = ratio x sum over running of min(left, clip) + sum over joining of min(left, clip)
    """
    clip = rank.engine.max_new_tokens_clip
    growth = rank.new_token_ratio * float(np.minimum(rank.left, clip).sum())
    growth += sum(min(each.output_tokens - each.emitted, clip) for each in joining)
    room = rank.pool.available * rank.pool.page_tokens - growth
    return missing_tokens + min(request.output_tokens - request.emitted, clip) < room


def _lookahead_fits(rank: Rank, request: Request, missing_tokens: int, joining: list[Request]) -> bool:
    """SGLang's add_one_req_ignore_eos, used when the prefix cache is off and answers have known lengths.

    Walks forward over the ends of all answers in order: before each, the pool must hold one token per step
    for everyone still running, given what those that ended gave back.
    """
    room = rank.pool.available * rank.pool.page_tokens - missing_tokens
    others = [*joining, request]
    left = np.concatenate([rank.left, [each.output_tokens - each.emitted for each in others]])
    held = np.concatenate([rank.kv, [each.target for each in others]])
    order = np.argsort(left, kind="stable")
    left, held = left[order], held[order]
    still_running = len(left) - np.arange(len(left))
    freed_before = np.cumsum(held) - held
    return bool(np.all(room + freed_before - left * still_running > still_running))


def _make_room(rank: Rank) -> bool:
    """Preempts until the next decode step has its pages; whether anyone was preempted."""
    if not rank.lacks_pages():
        return False
    while rank.lacks_pages():
        rank.preempt(_victim(rank))
    engine = rank.engine
    if engine.admission == "estimate":
        asked = sum(request.output_tokens for request in rank.running)
        made = asked - int(rank.left.sum())
        ratio = (made + engine.retract_decode_steps * len(rank.running)) / (asked + 1)
        rank.new_token_ratio = min(1.0, ratio)
    return True


def _makes_room_for(rank: Rank, request: Request, tokens: int) -> bool:
    """Preempts until a prompt's next chunk has its pages; False where the prompt itself was the last to go."""
    while request in rank.prefilling:
        rank.preempt(_victim(rank))
        if request in rank.prefilling and rank.pool.extend(request, tokens):
            return True
    return False


def _victim(rank: Rank) -> Request:
    """Whom the engine preempts."""
    if rank.prefilling:
        return rank.prefilling[-1]
    if rank.engine.preemption_victim == "last":
        return rank.running[-1]
    made = [request.output_tokens - int(left) for request, left in zip(rank.running, rank.left, strict=True)]
    return min(zip(made, (-r.prompt_tokens for r in rank.running), rank.running, strict=True), key=lambda t: t[:2])[2]
