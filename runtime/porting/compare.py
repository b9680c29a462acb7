"""What number formats do to a model: runs in a chip's formats against the same model in float32.

Both read the same text, position by position (teacher forcing), so that every figure compares like with like:

    logit error      rms of the difference of the logits, over the rms of the float32 logits; each centred
    KL               sum over the vocabulary of p ln(p / q), p the float32 model's and q the chip's, in nats
    top-1 agreement  positions whose likeliest token is the same
    perplexity       exp of the mean negative log-likelihood of the text's own next tokens
    hidden error     rms of the difference of the residual stream after a layer, over its rms
    routing          shared experts of a token over its experts, mean over tokens
    selection        shared context positions over those selected, mean over tokens that have more to choose from

The float32 model also continues prompts greedily; where the chip's likeliest token first differs from that, its own
greedy text would first differ. "bf16" is always compared too: what 16 bits alone do, before any narrow format.

The numbers depend on the formats, not on how fast or large a chip is: two chips with the same formats differ only in
the order of their sums, which is not emulated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import hw_profiles
from backends.emulation.table import format_table
from foundation.errors import UsageError
from foundation.limits import within
from foundation.reading import Unreadable, read_text
from hw_profiles import Profile
from model.checkpoint import Checkpoint
from model.config import ModelConfig
from model.formats import CacheFormats, Formats
from model.tokenizer import ChatTemplate, Tokenizer
from runtime.deployment.choice import chip_formats
from runtime.execution.prompts import read_prompts
from runtime.reports.compare import BASELINE
from runtime.training.config import DEFAULT as OWN_TRAINING
from runtime.training.config import read as read_config
from runtime.training.data import HARDER, MOST_QUESTIONS, TASKS, Generator

if TYPE_CHECKING:
    from backends.emulation.fidelity import Observed
    from backends.emulation.number_formats import NumberFormats
    from runtime.execution.local.engine import EngineConfig, LocalEngine

_TEXT = Path(__file__).parents[1] / "data" / "compare.txt"
_PROMPTS = ("A mixture of experts", "The capital of France is", "To serve a large model you need", "1, 2, 3, 4,")
_LEAST = 1e-300  # of a probability, before its logarithm is taken


@dataclasses.dataclass(frozen=True)
class Compared:
    """A profile in one of its formats: `profile`, the scheme's name or None for its own, the cache's format."""

    label: str
    profile: Profile
    formats: str | None = None
    kv: str | None = None

    @classmethod
    def parse(cls, text: str, formats: str | None = None) -> Compared:
        """PROFILE[:FORMATS[:CACHE]], as in `ascend-910c:w4a8:int8`. `formats` is for those that name none."""
        name, *rest = text.split(":")
        if len(rest) > 2 or not name or not all(rest):
            raise UsageError(f"{text!r} is not PROFILE[:FORMATS[:CACHE]], as in ascend-910c:w4a8:int8")
        chosen = rest[0] if rest else formats
        return cls(text, hw_profiles.load(name), chosen, rest[1] if len(rest) > 1 else None)


@dataclasses.dataclass(frozen=True)
class Texts:
    """What the models read: text token ids in windows of equal length, and prompts to continue."""

    windows: list[np.ndarray]
    prompts: list[tuple[str, tuple[int, ...]]]
    source: str = "a text"

    @property
    def length(self) -> int:
        return len(self.windows[0])


def read_texts(
    checkpoint: Checkpoint, tokenizer: Tokenizer, text: Path | None, prompts: Path | None, window: int, max_tokens: int
) -> Texts:
    """The text cut into windows of `window` tokens, or one shorter one; raises `UsageError` for what cannot be used.

    By default a page of prose; for the embedded checkpoint, which knows no prose, text of the kind it was trained on,
    in windows as long as it was trained on at most: further on it guesses.
    """
    cfg, own = checkpoint.config, _own_kind(checkpoint, tokenizer)
    if own and text is None:
        asked, window = window, min(window, cfg.max_positions, max(s.length for s in read_config(OWN_TRAINING).stages))
        drawn = [(part, task) for part in range(-(-asked // window)) for task in TASKS]  # as much text in all
        cut = [np.asarray(own.row(np.random.default_rng(i), t, window)[0], np.int32) for i, (_, t) in enumerate(drawn)]
        source = "text of the kind and length that this model was trained on"
    else:
        try:
            read = read_text(text or _TEXT)
        except Unreadable as error:
            raise UsageError(f"--text {text}: {error}") from None
        ids = tokenizer.encode(read, add_special_tokens=True)
        window = min(window, len(ids), cfg.max_positions)
        if window < 2:
            raise UsageError(f"--text {text}: {len(ids)} tokens; give at least 2")
        cut = [np.asarray(ids[i : i + window], np.int32) for i in range(0, len(ids) - window + 1, window)]
        source = str(text) if text else "the prose that ships with glm5"
    lines = _PROMPTS
    if prompts:
        lines = read_prompts(prompts)
    elif own:
        lines = [own.questions(task, 1)[0].prompt for task in ("sentences", "arithmetic", "copy", "long-copy")]
    encoded = [(line, tuple(tokenizer.encode(line, add_special_tokens=True))) for line in lines]
    for line, prompt in encoded:
        if not prompt or len(prompt) + max_tokens > cfg.max_positions:
            raise UsageError(
                f"prompt {line[:40]!r}: {len(prompt)} + {max_tokens} tokens, but {cfg.name} has 1 to "
                f"{cfg.max_positions} positions"
            )
    return Texts(cut, encoded, source)


def _own_kind(checkpoint: Checkpoint, tokenizer: Tokenizer) -> Generator | None:
    """What makes text that the embedded checkpoint knows; None for any other."""
    from runtime.execution.local.load import embedded_checkpoint

    if checkpoint.path.resolve() != embedded_checkpoint().resolve():
        return None
    return Generator(tokenizer, ChatTemplate.load(checkpoint.path))


def compare(
    checkpoint: Checkpoint,
    targets: Sequence[Compared],
    texts: Texts,
    tokenizer: Tokenizer,
    max_tokens: int = 32,
    questions: int = 0,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """The comparison as a JSON object; see the module's definitions.

    max_tokens: greedy tokens a prompt is continued by. questions: of each task of `glm5 eval` (0: not asked).
    Raises `Unsupported` before anything runs where a profile has no units for the formats asked of it.
    """
    from backends.emulation.number_formats import NumberFormats

    within("questions a task:", questions, MOST_QUESTIONS)
    cfg = checkpoint.config
    wanted = [
        (target, NumberFormats(cfg, chip_formats(cfg, target.profile, target.formats, target.kv))) for target in targets
    ]
    plain = NumberFormats(cfg, Formats("f32", "f32", "f32", CacheFormats.plain("f32")))
    wide = NumberFormats(cfg, Formats())
    runs = [(BASELINE, None, wide), *((t.label, t.profile, f) for t, f in wanted)]
    steps = len(runs) + 1
    progress(f"1 of {steps}: float32, the reference, {len(texts.windows)} x {texts.length} tokens")
    continued = _continue(checkpoint, texts, max_tokens)
    sequences = texts.windows + [_padded(ids, texts.length) for _, ids in continued]
    reference = _observe(checkpoint, plain, sequences)
    rows = []
    for step, (label, profile, formats) in enumerate(runs, 2):
        progress(f"{step} of {steps}: {label}, {formats.name}")
        found = _observe(checkpoint, formats, sequences)
        row = _row(cfg, texts, continued, tokenizer, reference, found)
        if questions:
            progress(f"{step} of {steps}: {label}, questions")
            row["tasks"] = _answers(checkpoint, formats, questions)
        table = format_table(cfg, formats.formats)
        rows.append(
            {
                "label": label,
                "profile": profile.name if profile else None,
                "formats": formats.scheme.name,
                "cache": formats.formats.kv,
                "index_cache": formats.formats.cache.of("index").kind if cfg.indexer else None,
                **row,
                "table": [dataclasses.asdict(line) for line in table],
            }
        )
    likely = [_probabilities(run.logits).max(axis=-1) for run in reference[: len(texts.windows)]]
    result = {
        "checkpoint": str(checkpoint.path),
        "model": checkpoint.path.resolve().name,
        "stored_as": cfg.weight_format,
        "text": texts.source,
        "text_tokens": texts.length * len(texts.windows),
        "window_tokens": texts.length,
        "prompts": len(texts.prompts),
        "continued_tokens": max_tokens,
        "index_topk": cfg.indexer.topk if cfg.indexer else None,
        "reference": {
            "perplexity": _perplexity(texts, reference),
            "top1_probability": float(np.mean(np.concatenate(likely))),
            "layers": [kind.name for kind in cfg.layers],
        },
        "profiles": rows,
    }
    if questions:
        progress("float32, questions")
        result["reference"]["tasks"] = _answers(checkpoint, plain, questions)
    return result


# --- runs ------------------------------------------------------------------------------------------------


def _observe(checkpoint: Checkpoint, formats: NumberFormats, sequences: Sequence[np.ndarray]) -> list[Observed]:
    from backends.emulation.fidelity import Observer, load

    observer = Observer(checkpoint.config, load(checkpoint, formats), formats)
    return [observer.run(tokens) for tokens in sequences]


def _engine(checkpoint: Checkpoint, formats: NumberFormats, limits: EngineConfig) -> LocalEngine:
    """An engine on the host that computes in these formats."""
    from backends.emulation.host import Converted, EmulatedCpu
    from runtime.execution.local.load import load_engine

    return load_engine(Converted(checkpoint.path, formats), EmulatedCpu(formats), limits, formats.dtype, keep_fp8=True)


def _continue(checkpoint: Checkpoint, texts: Texts, max_tokens: int) -> list[tuple[int, tuple[int, ...]]]:
    """Each prompt with the float32 model's greedy continuation: (prompt's length, ids)."""
    from backends import registry
    from runtime.execution.batches import gear
    from runtime.execution.local.engine import EngineConfig
    from runtime.execution.local.load import load_engine
    from runtime.execution.local.request import Prompt

    room = gear(max(len(ids) for _, ids in texts.prompts) + max_tokens)
    limits = EngineConfig(pool_tokens=len(texts.prompts) * 2 * room, least_batch=gear(len(texts.prompts)))
    limits = dataclasses.replace(limits, max_running=len(texts.prompts), least_context=room, least_chunk=room)
    engine = load_engine(checkpoint, registry.usable("cpu"), limits, "float32")
    stop = frozenset(checkpoint.config.eos_token_ids)
    done = engine.generate([Prompt(ids, max_tokens, stop_ids=stop) for _, ids in texts.prompts])
    return [(len(c.prompt_ids), tuple(c.prompt_ids) + tuple(c.token_ids)) for c in done]


def _answers(checkpoint: Checkpoint, formats: NumberFormats, questions: int) -> dict[str, float]:
    """Share of right answers by task of `glm5 eval`, and by the harder ones that leave room for more or less."""
    from runtime.training.evaluate import ask, engine_config

    found = ask(_engine(checkpoint, formats, engine_config()), checkpoint.path, questions, (*TASKS, *HARDER))
    return {name: score.exact_match for name, score in found.tasks.items()}


def _padded(ids: Sequence[int], length: int) -> np.ndarray:
    """A sequence at the length of the windows, so that one program serves both: what is behind a position does not
    change it. Longer ones stay as they are."""
    out = np.zeros(max(length, len(ids)), np.int32)
    out[: len(ids)] = ids
    return out


# --- figures ---------------------------------------------------------------------------------------------


def _log_probabilities(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide = wide - wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


def _probabilities(logits: np.ndarray) -> np.ndarray:
    return np.exp(_log_probabilities(logits))


def _perplexity(texts: Texts, runs: Sequence[Observed]) -> float:
    scores = []
    for tokens, run in zip(texts.windows, runs, strict=False):
        scores.append(-np.take_along_axis(_log_probabilities(run.logits[:-1]), tokens[1:, None], axis=1)[:, 0])
    return float(np.exp(np.mean(np.concatenate(scores))))


def divergence(reference: np.ndarray, found: np.ndarray) -> np.ndarray:
    """KL(reference || found) of each row of logits [.., vocab], in nats; never below zero."""
    p, q = _log_probabilities(reference), _log_probabilities(found)
    return np.maximum((np.exp(p) * (p - q)).sum(axis=-1), 0.0)


def relative_error(reference: np.ndarray, found: np.ndarray) -> float:
    """rms of the difference over rms of the reference."""
    difference = (found - reference).astype(np.float64)
    return float(np.sqrt(np.mean(difference**2) / max(np.mean(reference.astype(np.float64) ** 2), _LEAST)))


def overlap(reference: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Share of the entries of each row [t, k] of `reference` that the same row of `found` has too."""
    return np.array([len(np.intersect1d(a, b)) / len(a) for a, b in zip(reference, found, strict=True)])


def _centred(logits: np.ndarray) -> np.ndarray:
    return logits - logits.mean(axis=-1, keepdims=True)


def _row(
    cfg: ModelConfig,
    texts: Texts,
    continued: Sequence[tuple[int, tuple[int, ...]]],
    tokenizer: Tokenizer,
    reference: Sequence[Observed],
    found: Sequence[Observed],
) -> dict[str, Any]:
    count = len(texts.windows)
    pairs = list(zip(reference[:count], found[:count], strict=True))
    kl = np.concatenate([divergence(a.logits, b.logits) for a, b in pairs])
    same = np.concatenate([a.logits.argmax(-1) == b.logits.argmax(-1) for a, b in pairs])
    logits = [np.concatenate([_centred(run.logits) for run in side[:count]]) for side in (reference, found)]
    layers = [_layer(cfg, index, pairs) for index in range(cfg.num_layers)]
    firsts = [
        _first_difference(tokenizer, prompt, start, ids, a.logits, b.logits)
        for (prompt, _), (start, ids), a, b in zip(
            texts.prompts, continued, reference[count:], found[count:], strict=True
        )
    ]
    return {
        "logit_error": relative_error(*logits),
        "kl_nats": {"mean": float(kl.mean()), "p99": float(np.quantile(kl, 0.99)), "max": float(kl.max())},
        "top1_agreement": float(same.mean()),
        "perplexity": _perplexity(texts, found),
        "layers": layers,
        "first_difference": firsts,
        "kl_quantiles": [[q, float(np.quantile(kl, q))] for q in np.linspace(0, 1, 51).tolist()],
    }


def _layer(cfg: ModelConfig, index: int, pairs: Sequence[tuple[Observed, Observed]]) -> dict[str, Any]:
    hidden = [np.concatenate([run.hidden[index] for run in side]) for side in zip(*pairs, strict=True)]
    out: dict[str, Any] = {"layer": index, "hidden_error": relative_error(*hidden), "routing": None, "selection": None}
    if index in pairs[0][0].experts:
        out["routing"] = float(np.mean([overlap(a.experts[index], b.experts[index]) for a, b in pairs]))
    if index in pairs[0][0].selected and cfg.indexer:
        later = slice(cfg.indexer.topk, None)  # tokens before see no more than is selected
        out["selection"] = float(
            np.mean([overlap(a.selected[index][later], b.selected[index][later]) for a, b in pairs])
        )
    return out


def _first_difference(
    tokenizer: Tokenizer, prompt: str, start: int, ids: Sequence[int], reference: np.ndarray, found: np.ndarray
) -> dict[str, Any]:
    """Where greedy decoding would first leave the float32 model's text."""
    generated = len(ids) - start
    base = {"prompt": prompt, "generated": generated, "text": tokenizer.decode(list(ids[start:]))}
    for at in range(generated):
        row = start + at - 1  # the position whose logits choose this token
        chosen = int(found[row].argmax())
        if chosen == ids[start + at]:
            continue
        p, q = _probabilities(reference[row]), _probabilities(found[row])
        wanted = ids[start + at]
        return {
            **base,
            "at": at,
            "before": tokenizer.decode(list(ids[max(0, start + at - 12) : start + at])),
            "reference": {"text": tokenizer.decode([wanted]), "p": float(p[wanted]), "p_here": float(q[wanted])},
            "found": {"text": tokenizer.decode([chosen]), "p": float(p[chosen]), "p_here": float(q[chosen])},
        }
    return {**base, "at": None}
