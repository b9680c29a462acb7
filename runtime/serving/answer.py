"""An answer while it is made: its tokens so far, which may come next, and what its client has not been told yet."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Sequence

import numpy as np

from runtime.serving.executor import GREEDY, TokenChoice
from runtime.serving.sampling import log_probabilities, settle
from runtime.serving.service import ConstraintBroken, Finish, Job, JobFault, TokenLogprob, Update

_MOST_TOP_K = 2**31 - 1  # of a device, and more than any vocabulary has
_COLDEST = 1e-6
"""The least temperature that others draw at: float32 has to hold it."""


class Answer:
    """A job at work.

    number: how clients call it. tokens: those of the prompt, then those made. drafts: guesses at what follows.
    finish, error, fault: as of `Update`. kept: the logits after each position, where `keep_logits`.
    """

    def __init__(self, job: Job, number: int, seed: Sequence[int] | None = None, keep_logits: bool = False):
        self.job, self.number = job, number
        self.tokens = list(job.prompt_ids)
        self.drafts: list[int] = []
        self.finish: Finish | None = None
        self.error: str | None = None
        self.fault: JobFault = "server"
        self.kept: dict[int, np.ndarray] | None = {} if keep_logits else None
        self.verify_steps = self.verified_tokens = 0
        self._rng = _Uniforms([job.sampling.seed, 0] if seed is None else seed)
        self._told = 0
        self._logprobs: list[TokenLogprob] = []
        self._grammar: np.ndarray | None = None
        self._looked = False

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.job.prompt_ids)

    def extend(self, logits: np.ndarray, drafts: Sequence[int] = ()) -> int:
        """Goes on as far as the drafts hold, and by one token more. logits [1 + drafts, vocab]: row j is what the model
        says after j drafts. Returns how many tokens were made; none where a constraint allows none."""
        before = self.generated
        for row, draft in zip(logits, [*drafts, None], strict=True):
            allowed = self._allowed(row.shape[0])
            if self.finish:
                break
            token = settle(row, draft, self.job.sampling, self._rng, allowed)
            self.accept(token, row)
            if self.finish or token != draft:
                break
        return self.generated - before

    def choice(self, ahead: int = 0, logprobs: int | None = None) -> TokenChoice | None:
        """How the token after `ahead` more may be chosen by who computes its logits; None where they are needed here,
        or the answer may not come so far. logprobs: how many the chooser can name, if it tells log-probabilities."""
        job, sampling = self.job, self.job.sampling
        if self.kept is not None or job.constraint is not None or sampling.bias:
            return None
        if job.logprobs is not None and (logprobs is None or job.logprobs > logprobs):
            return None
        if self.generated + ahead >= job.max_tokens or (job.stop_ids and self.generated + ahead < job.min_tokens):
            return None
        if sampling.greedy:
            return GREEDY if job.logprobs is None else TokenChoice(logprobs=job.logprobs)
        if sampling.temperature < _COLDEST:
            return None
        uniform, top_k = self._rng.coming(ahead), min(sampling.top_k, _MOST_TOP_K)
        return TokenChoice(sampling.temperature, sampling.top_p, top_k, sampling.min_p, uniform, job.logprobs)

    def take(self, ids: Sequence[int], drafts: Sequence[int] = (), logprobs: Sequence[TokenLogprob] = ()) -> int:
        """As `extend`, by ids that were chosen as `choice` says, one for each row of logits."""
        before = self.generated
        for place, (token, draft) in enumerate(zip(ids, [*drafts, None], strict=True)):
            if not self.job.sampling.greedy:
                self._rng.random()  # the one it was chosen by
            if self.job.logprobs is not None:
                self._logprobs.append(logprobs[place])
            self.accept(int(token))
            if self.finish or token != draft:
                break
        return self.generated - before

    def accept(self, token: int, logits: np.ndarray | None = None) -> None:
        """The next token is this one."""
        job = self.job
        self.tokens.append(token)
        if job.logprobs is not None and logits is not None:
            self._logprobs.append(_logprob(logits, token, job.logprobs))
        self._looked, self._grammar = False, None
        if token in job.stop_ids:
            self.finish = "stop"
        elif self.generated >= job.max_tokens:
            self.finish = "length"
        elif job.constraint is not None:
            try:
                job.constraint.accept(token)
            except Exception as error:  # others' code, and one answer's
                self.fail(str(error) or type(error).__name__, _whose(error))
            else:
                self._look()

    def choose(self, wanted: int, vocab: int) -> int:
        """Goes on with a token that no model has made: the one wanted, or where that may not come the first that may.
        Returns how many tokens were made."""
        allowed = self._allowed(vocab)
        if self.finish:
            return 0
        self.accept(wanted if allowed is None or allowed[wanted] else int(np.argmax(allowed)))
        return 1

    def fail(self, why: str, fault: JobFault = "server") -> None:
        self.finish, self.error, self.fault = "error", why, fault

    def news(self, cached_tokens: int) -> Update:
        """What the client has not been told yet."""
        fresh = self.tokens[len(self.job.prompt_ids) + self._told :]
        self._told += len(fresh)
        logprobs, self._logprobs = tuple(self._logprobs), []
        return Update(tuple(fresh), logprobs, cached_tokens, self.finish, self.error, fault=self.fault)

    @property
    def has_news(self) -> bool:
        return self.finish is not None or self.generated > self._told

    def _look(self) -> None:
        """Asks the constraint what may come next. Where that is nothing, the answer is finished."""
        if self._looked or self.job.constraint is None:
            return
        self._looked = True
        try:
            self._grammar = self.job.constraint.allowed()
        except Exception as error:  # others' code, and one answer's
            self.fail(str(error) or type(error).__name__, _whose(error))
        else:
            if self._grammar is not None and not self._grammar.any():
                self.finish = "stop"

    def _allowed(self, vocab: int) -> np.ndarray | None:
        """bool [vocab]: what may come next, None where everything may. Where only a stop token may, it may come before
        `min_tokens`, too."""
        self._look()
        if self._grammar is not None and len(self._grammar) != vocab:  # a tokenizer knows fewer tokens than a model has
            known = self._grammar[:vocab]
            self._grammar = np.zeros(vocab, bool)
            self._grammar[: len(known)] = known
        if self.generated >= self.job.min_tokens or not self.job.stop_ids:
            return self._grammar
        going_on = np.ones(vocab, bool) if self._grammar is None else self._grammar.copy()
        going_on[[each for each in self.job.stop_ids if each < vocab]] = False
        return going_on if going_on.any() else self._grammar


class _Uniforms:
    """Numbers from [0,1), one behind the other, of which some may be looked at before it is their turn."""

    def __init__(self, seed: Sequence[int]):
        self._rng, self._coming = np.random.default_rng(seed), deque[float]()

    def random(self) -> float:
        return self._coming.popleft() if self._coming else self._rng.random()

    def coming(self, ahead: int) -> float:
        """The one after `ahead` others."""
        while len(self._coming) <= ahead:
            self._coming.append(self._rng.random())
        return self._coming[ahead]


def _whose(error: Exception) -> JobFault:
    return "constraint" if isinstance(error, ConstraintBroken) else "server"


def _logprob(logits: np.ndarray, token: int, top: int) -> TokenLogprob:
    found = log_probabilities(logits)
    best = np.argsort(-found, kind="stable")[:top]
    return TokenLogprob(float(found[token]), tuple((int(each), float(found[each])) for each in best))


def page_hashes(tokens: Sequence[int], page_tokens: int) -> tuple[int, ...]:
    """One number for each whole page of tokens, standing for it and everything before it. So long that no two pages
    are mistaken for one another: a request must never read another's answer."""
    ids = np.asarray(tokens, "<i8")
    found, last = [], b""
    for end in range(page_tokens, len(ids) + 1, page_tokens):
        last = hashlib.blake2b(last + ids[end - page_tokens : end].tobytes(), digest_size=16).digest()
        found.append(int.from_bytes(last, "little"))
    return tuple(found)
