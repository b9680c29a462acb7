"""What a step of reinforcement learning minimises.

A = reward less the mean of its group (GRPO), over the group's deviation where asked; the same for every token that the
policy drew. With p the policy that learns, q the one that drew (its log-probabilities came with the tokens), sg no
gradient, a token's loss is, for a correction

    none          -A log p
    ppo-clip      max(-rA, -clip(r, 1 - low, 1 + high) A)              r = p / q
    tis           -min(sg(r), cap) A log p                             truncated importance sampling
    icepop        -sg(r) A log p where 1/icepop <= r <= icepop, else 0
    double-sided  -rA where 1 - low <= r <= 1 + high, else 0           both sides are masked, whatever A's sign

Sources: GRPO arXiv 2402.03300; TIS and IcePop as slime has them; double-sided GLM-5 arXiv 2602.15763. A step makes one
update, so p is also the policy before the update, and r holds all that lies between the two: the versions that q is
behind, and what its engine and number formats compute otherwise. `distill` adds to A, a token at a time,
-distill * sg(log p - log t), t the policy that the stage began with (on-policy distillation).

The loss is the mean over all drawn tokens of the batch. Shapes: r rollouts, t tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from runtime.training.rl.config import PolicyObjective
from runtime.training.rl.episodes import RolloutGroup


class LearnerBatch(NamedTuple):
    """tokens int32 [r,t]; made float32 [r,t], 1 where the policy drew; logprobs float32 [r,t], when it was drawn;
    advantages float32 [r]; choices, by name, int32 [layers,r,t,width], -1 where nothing was recorded."""

    tokens: np.ndarray
    made: np.ndarray
    logprobs: np.ndarray
    advantages: np.ndarray
    choices: Mapping[str, np.ndarray] = {}


def advantages(rewards: np.ndarray, scale: bool) -> np.ndarray:
    """Of one group [size]: above its mean, over its deviation where `scale`. 0 where all are alike."""
    above = rewards - rewards.mean()
    deviation = rewards.std()
    return above / deviation if scale and deviation > 0 else above


def row_length(groups: list[RolloutGroup], most: int) -> int:
    """Tokens of a batch's rows: its longest episode, rounded up to a quarter of `most` (and to a multiple of 8), so
    that a stage compiles four programs at most and short episodes are not padded to the longest there might be."""
    unit = -(-most // 32) * 8
    longest = max(each.length for group in groups for each in group.rollouts)
    return min(most, -(-longest // unit) * unit)


def batch(
    groups: list[RolloutGroup], length: int, scale: bool, replayed: Mapping[str, tuple[int, int]] = MappingProxyType({})
) -> LearnerBatch:
    """Rollouts in rows of `length` tokens, zeros behind them. replayed: as of `replay.widths`."""
    rollouts = [each for group in groups for each in group.rollouts]
    shape = len(rollouts), length
    found = LearnerBatch(
        np.zeros(shape, np.int32), np.zeros(shape, np.float32), np.zeros(shape, np.float32), np.zeros(shape[0])
    )
    for row, each in enumerate(rollouts):
        found.tokens[row, : each.length] = each.ids
        found.made[row, : each.length] = each.made
        found.logprobs[row, : each.length] = each.logprobs
    choices = {name: np.full((layers, *shape, width), -1, np.int32) for name, (layers, width) in replayed.items()}
    for name, into in choices.items():
        for row, each in enumerate(rollouts):
            if name in each.choices:
                into[:, row, : each.length] = each.choices[name].array
    found.advantages[:] = np.concatenate([advantages(group.rewards, scale) for group in groups])
    return found._replace(advantages=found.advantages.astype(np.float32), choices=choices)


def log_probabilities(logits: Array, tokens: Array) -> Array:
    """Of each token given those before it, float32 [r,t]; 0 for the first."""
    picked = jnp.take_along_axis(logits[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
    found = picked - jax.scipy.special.logsumexp(logits[:, :-1], axis=-1)
    return jnp.pad(found, ((0, 0), (1, 0)))


def token_losses(how: PolicyObjective, learner: Array, drawn: Array, advantage: Array) -> tuple[Array, Array]:
    """Losses of tokens, and 1 where the correction cut one, both float32 like `learner`, the log-probabilities of the
    policy that learns. drawn: those of the one that drew."""
    ratio = jnp.exp(learner - drawn)
    fixed, low, high = jax.lax.stop_gradient(ratio), 1 - how.clip_low, 1 + how.clip_high
    match how.correction:
        case "none":
            return -advantage * learner, jnp.zeros_like(learner)
        case "ppo-clip":
            plain, clipped = -ratio * advantage, -jnp.clip(ratio, low, high) * advantage
            return jnp.maximum(plain, clipped), (clipped > plain).astype(jnp.float32)
        case "tis":
            return -jnp.minimum(fixed, how.cap) * advantage * learner, (fixed > how.cap).astype(jnp.float32)
        case "icepop":
            kept = (fixed >= 1 / how.icepop) & (fixed <= how.icepop)
            return jnp.where(kept, -fixed * advantage * learner, 0.0), 1.0 - kept.astype(jnp.float32)
        case "double-sided":
            kept = (fixed >= low) & (fixed <= high)
            return jnp.where(kept, -ratio * advantage, 0.0), 1.0 - kept.astype(jnp.float32)


def loss(
    how: PolicyObjective, logits: Array, given: LearnerBatch, teacher: Array | None = None
) -> tuple[Array, dict[str, Array]]:
    """The loss of logits [r,t,vocab], and what the metrics show. teacher: the log-probabilities of `distill`."""
    made = jnp.asarray(given.made)
    learner = log_probabilities(logits, jnp.asarray(given.tokens))
    drawn = jnp.where(made > 0, given.logprobs, learner)  # a ratio of 1 where nothing was drawn
    advantage = jnp.broadcast_to(jnp.asarray(given.advantages)[:, None], learner.shape)
    if teacher is not None:
        advantage = advantage - jnp.float32(how.distill) * jax.lax.stop_gradient(learner - teacher)
    losses, cut = token_losses(how, learner, jax.lax.stop_gradient(drawn), advantage)
    count = jnp.maximum(jnp.sum(made), 1.0)

    def mean(values: Array) -> Array:
        return jnp.sum(values * made) / count

    share = jax.nn.softmax(logits[:, :-1], axis=-1)
    entropy = jax.scipy.special.logsumexp(logits[:, :-1], axis=-1) - jnp.sum(share * logits[:, :-1], axis=-1)
    gap = jnp.abs(learner - drawn)
    return mean(losses), {
        "loss": mean(losses),
        "entropy": mean(jnp.pad(entropy, ((0, 0), (1, 0)))),
        "cut": mean(cut),
        "gap": mean(gap),
        "gap_max": jnp.max(gap * made),
    }
