"""The graph as a Flax NNX module.

`Model` holds the weights that `model.weights` describes, at the names and in the layout of `model.checkpoint`:
`model.layers[3].q_b`. Each is a variable whose type says what it is (`param_type`), for `nnx` filters to choose by;
its metadata hold the description as `weight`, and as `out_sharding` the logical axes, which a plan or
`nnx.logical_axis_rules` maps to mesh axes. Calling the model is `graph.step` over fresh caches, so there is no second
definition of anything.

    model = Model.load(DIR)
    logits = model(tokens)  # int32 [b,t] -> float32 [b,t,vocab]
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from model import graph, ops
from model.cache import cache_rows
from model.checkpoint import Checkpoint, Group, groups, held_type
from model.checkpoint_writer import save
from model.config import LayerType, ModelConfig
from model.errors import CheckpointError
from model.weights import Weight

# --- variable types ------------------------------------------------------------------------------


class MatrixParam(nnx.Param):
    """A matrix, or several in one array."""


class PerHeadParam(MatrixParam):
    """A projection to queries, keys or values: a matrix a head."""


class ExpertParam(MatrixParam):
    """Matrices of the routed experts."""


class VectorParam(nnx.Param):
    """A norm's gain, or a bias."""


class IndexerParam(nnx.Param):
    """Anything of an indexer: it selects, so no gradient of what the model says reaches it."""


class IndexerMatrix(MatrixParam, IndexerParam):
    """A matrix of an indexer."""


class IndexerVector(VectorParam, IndexerParam):
    """The gain or bias of an indexer's norm."""


class VocabularyParam(nnx.Param):
    """The embedding, or the head: a vector a token."""


class RouterParam(nnx.Param):
    """A router's matrix: a vector an expert."""


class RouterBias(nnx.Variable):
    """What a router adds to choose by. It balances the experts' loads and has no gradient, so it is no `nnx.Param`."""


def param_type(weight: Weight) -> type[nnx.Variable]:
    """The variable type of a weight."""
    if weight.component == "router":
        return RouterParam if weight.matrix_dims else RouterBias
    if "vocab" in weight.axes:
        return VocabularyParam
    if not weight.matrix_dims:
        return IndexerVector if weight.of_indexer else VectorParam
    if weight.of_indexer:
        return IndexerMatrix
    if weight.expert_count:
        return ExpertParam
    return PerHeadParam if weight.heads else MatrixParam


# --- the module ----------------------------------------------------------------------------------

LayerVariables = nnx.Dict[nnx.Variable]


class Model(nnx.Module):
    """A model of `cfg`: `outer` holds embedding, final norm and head by name, `layers` and `mtp` the same of a layer.

    weights: as `Checkpoint.load` returns them, none of them quantised; without, they are random, drawn from `rngs`, in
    `dtype` ("float32" or "bfloat16"). raw_config: the fields of config.json, which `save` writes.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        weights: Mapping[str, Any] | None = None,
        *,
        rngs: nnx.Rngs | None = None,
        dtype: str = "float32",
        raw_config: Mapping[str, Any] | None = None,
    ):
        if weights is None:
            if rngs is None:
                raise TypeError("a model is made of `weights`, or drawn from `rngs`")
            weights = random_weights(cfg, rngs, dtype)
        self.config = cfg
        self._raw_config = json.dumps(raw_config) if raw_config else None  # what is static must have a hash
        found = groups(cfg, mtp=bool(weights["mtp"]))
        self.outer = _variables(found["outer"][0], weights["outer"])
        self.layers, self.mtp = (
            nnx.List([_variables(group, held) for group, held in zip(found[place], weights[place], strict=True)])
            for place in ("layers", "mtp")
        )

    @classmethod
    def load(cls, path: str | Path, dtype: str = "float32", mtp: bool = True) -> Model:
        """The model in a checkpoint directory, in "float32" or "bfloat16"; what is stored quantised is dequantised.

        With `mtp` the MTP layers too, where they are stored. Raises `ConfigError` or `CheckpointError`.
        """
        checkpoint = Checkpoint(path)
        weights = checkpoint.load(dtype, put=lambda weight, array: jnp.asarray(array), mtp=mtp)
        return cls(checkpoint.config, weights, raw_config=checkpoint.raw_config)

    def save(self, path: str | Path, dtype: str | None = None) -> None:
        """Writes a checkpoint directory that `load`, the engine and transformers read: config.json and shards; the
        tokenizer's files are not the model's. dtype: "float32" or "bfloat16" (default: as held).

        Raises `CheckpointError` where the directory exists, or the model has no `raw_config`.
        """
        if self._raw_config is None:
            raise CheckpointError(f"{path}: this model was made without `raw_config`, the fields of its config.json")

        def host(variable: Any) -> np.ndarray:
            array = np.asarray(variable.get_value())
            return array.astype(held_type(variable.weight, dtype), copy=False) if dtype else array

        save(path, json.loads(self._raw_config), self._each(host))

    def weights(self) -> dict[str, Any]:
        """The arrays as the graph takes them: `{"outer": {..}, "layers": [{..}], "mtp": [{..}]}`."""
        return self._each(lambda variable: variable.get_value())

    def seen(self, see: Callable[[Weight, Array], Array]) -> dict[str, Any]:
        """`weights`, each as `see` has it."""
        return self._each(lambda variable: see(variable.weight, variable.get_value()))

    def __call__(self, tokens: Any) -> Array:
        """Tokens int32 [b,t], each sequence from its start -> float32 logits [b,t,vocab] of the main stack.

        May be differentiated and batched; compiled once a shape, alone or inside `nnx.jit`.
        """
        return _logits(self.config, self.weights(), jnp.asarray(tokens, jnp.int32))

    def _each(self, read: Callable[[nnx.Variable], Any]) -> dict[str, Any]:
        def of(layer: LayerVariables) -> dict[str, Any]:
            return {name: read(variable) for name, variable in layer.items()}

        return {"outer": of(self.outer), "layers": list(map(of, self.layers)), "mtp": list(map(of, self.mtp))}


def _variables(group: Group, held: Mapping[str, Any]) -> LayerVariables:
    """The variables of a group of weights."""
    # the axes are logical, so no mesh has them: nothing can be placed by them at once
    return nnx.Dict(
        {
            weight.name: param_type(weight)(
                jnp.asarray(held[weight.name]), out_sharding=weight.axes, eager_sharding=False, weight=weight
            )
            for weight in group.weights
        }
    )


def random_weights(cfg: ModelConfig, rngs: nnx.Rngs, dtype: str = "float32") -> dict[str, Any]:
    """Weights to begin training with (`Weight.initial`), as `Checkpoint.load` returns them."""
    key, drawn = rngs.params(), itertools.count()

    def draw(weight: Weight) -> Array:
        mean, deviation = weight.initial
        array = jnp.full(weight.shape, mean, jnp.float32)
        if deviation:
            array = array + deviation * jax.random.normal(
                jax.random.fold_in(key, next(drawn)), weight.shape, jnp.float32
            )
        return array.astype(held_type(weight, dtype))

    made = {
        place: [{weight.name: draw(weight) for weight in group.weights} for group in found]
        for place, found in groups(cfg, mtp=True).items()
    }
    return {**made, "outer": made["outer"][0]}


# --- a pass over whole sequences -----------------------------------------------------------------

MODE = graph.Mode("expanded", "all")


@functools.partial(jax.jit, static_argnums=0)
def _logits(cfg: ModelConfig, weights: dict[str, Any], tokens: Array) -> Array:
    caches, batch = fresh(cfg, cfg.layers, tokens, weights["outer"]["embed"].dtype)
    run = ops.substitute(lambda *given: graph.step(cfg, *given, mode=MODE).logits, inline=True)
    return run(weights, caches, batch)


def fresh(
    cfg: ModelConfig, kinds: Sequence[LayerType], tokens: Array, dtype: Any
) -> tuple[list[graph.LayerCache], graph.Batch]:
    """What a step is given that feeds whole sequences, tokens int32 [b,t]: empty caches for layers of these types, with
    one page a sequence, as long as the sequence; and the batch."""
    b, t = tokens.shape
    caches = [{row.name: jnp.zeros((b + 1, t, *row.shape), dtype) for row in cache_rows(cfg, kind)} for kind in kinds]
    table = jnp.arange(1, b + 1, dtype=jnp.int32)[:, None]
    return caches, graph.Batch(tokens, jnp.zeros(b, jnp.int32), jnp.full(b, t, jnp.int32), table)
