"""Runs the graph in a scheme and keeps what two runs are compared by: logits, the residual stream after each layer,
and the experts and context positions that each token chose.

One pass over a text: every position sees the tokens of the text before it (teacher forcing), so runs can be compared
position by position however much they differ. A layer type is compiled once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from backends.emulation.number_formats import NumberFormats
from model import graph, ops
from model.cache import cache_rows
from model.checkpoint import Checkpoint
from model.config import LayerType, ModelConfig
from model.ops import OPS

_PAGE = 16


class Observed(NamedTuple):
    """A run over tokens [t], all on the host.

    logits [t, vocab] float32; hidden [layers][t, d] float32, the residual stream after each layer; experts {layer:
    [t, k]}, the routed experts; selected {layer: [t, k]}, the context positions of layers that own an indexer, where
    the context outgrew the selection (else empty).
    """

    logits: np.ndarray
    hidden: list[np.ndarray]
    experts: dict[int, np.ndarray]
    selected: dict[int, np.ndarray]


def load(checkpoint: Checkpoint, formats: NumberFormats) -> dict[str, Any]:
    """A checkpoint's weights as a chip with these formats holds them, on the default device."""
    quantised = formats.dtype != "float32"
    return checkpoint.load(
        "float32", quantised, put=lambda _, array: jnp.asarray(array), mtp=False, convert=formats.weight
    )


class Observer:
    """Runs texts through a model in given number formats."""

    def __init__(self, cfg: ModelConfig, weights: dict[str, Any], formats: NumberFormats):
        self.cfg, self.weights, self.formats = cfg, weights, formats
        self._compiled: dict[Any, Callable[..., Any]] = {}

    def run(self, tokens: np.ndarray) -> Observed:
        """tokens [t] of one text."""
        cfg, dtype = self.cfg, jnp.dtype(self.formats.dtype)
        length = len(tokens)
        pages = -(-length // _PAGE)
        batch = graph.Batch(
            np.asarray(tokens, np.int32)[None],
            np.zeros(1, np.int32),
            np.full(1, length, np.int32),
            np.arange(1, pages + 1, dtype=np.int32)[None],
        )
        view = graph.view_of(jax.tree.map(jnp.asarray, batch), _PAGE)
        outer = self.weights["outer"]
        x = ops.embed(jnp.asarray(batch.tokens), outer["embed"])
        selection, hidden = None, []
        experts: dict[int, np.ndarray] = {}
        selected: dict[int, np.ndarray] = {}
        for index, (kind, w) in enumerate(zip(cfg.layers, self.weights["layers"], strict=True)):
            cache = {row.name: jnp.zeros((pages + 1, _PAGE, *row.shape), dtype) for row in cache_rows(cfg, kind)}
            x, selection, seen = self._layer(kind, length)(w, x, cache, view, selection)
            hidden.append(np.asarray(x[0].astype(jnp.float32)))
            if "glm.route" in seen:
                experts[index] = np.asarray(seen["glm.route"])
            if "glm.select_topk" in seen:
                selected[index] = np.asarray(seen["glm.select_topk"][0])
        return Observed(np.asarray(self._head(outer, x)[0]), hidden, experts, selected)

    def _layer(self, kind: LayerType, length: int) -> Callable[..., Any]:
        if (kind, length) not in self._compiled:
            self._compiled[kind, length] = jax.jit(self._observed(kind))
        return self._compiled[kind, length]

    def _observed(self, kind: LayerType) -> Callable[..., Any]:
        cfg, lowerings = self.cfg, self.formats.lowerings()

        def layer(w: Any, x: Any, cache: Any, view: graph.View, selection: Any) -> Any:
            seen: dict[str, Any] = {}

            def keep(name: str, part: Callable[[Any], Any]) -> Callable[..., Any]:
                inner = lowerings.get(name, OPS[name].meaning)

                def run(*args: Any, **attributes: Any) -> Any:
                    out = inner(*args, **attributes)
                    seen[name] = part(out)
                    return out

                return run

            watched: Mapping[str, Callable[..., Any]] = {
                **lowerings,
                "glm.route": keep("glm.route", lambda out: out[0]),
                "glm.select_topk": keep("glm.select_topk", lambda out: out),
            }

            def body(w: Any, x: Any, cache: Any, view: graph.View, selection: Any) -> Any:
                out, _, chosen = graph.layer(cfg, kind, w, x, cache, view, selection, graph.Mode("expanded"))
                return out, chosen

            out, chosen = ops.substitute(body, watched)(w, x, cache, view, selection)
            return out, chosen, seen

        return layer

    def _head(self, outer: Any, x: Any) -> Any:
        cfg, lowerings = self.cfg, self.formats.lowerings()
        if "head" not in self._compiled:

            def head(outer: Any, x: Any) -> Any:
                return graph.head(cfg, outer, ops.rms_norm(x, outer["final_norm"], eps=cfg.norm_eps))

            self._compiled["head"] = jax.jit(ops.substitute(head, lowerings))
        return self._compiled["head"](outer, x)
