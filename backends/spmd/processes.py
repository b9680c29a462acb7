"""A plan's devices spread over processes, on one machine or many: JAX's distributed runtime.

Every process runs the same host loop. A stage's devices may belong to one process or to several; `Spread` runs the
program on them as `Hosts` does, and a process without a device of the stage passes it by. What the host loop looks at
(logits, a cache that moves, hidden states on their way to the next stage) is sent to all processes from the one that
holds the stage's first device, so that every process goes on from the same bits.
"""

from __future__ import annotations

import hmac
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.experimental import multihost_utils

from backends.errors import BackendUnavailable
from backends.interface import Backend, Executable, Order, Program
from backends.orders import laid
from backends.spmd.cluster import Cluster, Plain
from backends.spmd.stages import Hosts
from foundation.errors import CapacityError
from model.config import ModelConfig
from model.formats import CacheFormats
from model.graph import Carried
from model.split import Grid

_PATIENCE_SECONDS = 3600  # for collectives: a process may compile much longer than another; heartbeats see lost ones
_HEARTBEAT_SECONDS = 20


def join(
    platform: str, coordinator: str, bind: str, index: int, count: int, devices: int, timeout_seconds: int
) -> tuple[Any, ...]:
    """Joins the other processes, and returns the devices of all, `devices` / `count` from each, in their order.

    platform: as JAX names it. coordinator: HOST:PORT where process 0 listens, at `bind` and at no other address of its
    host. To be called before JAX has started. JAX asks nobody who he is: others have to, before and after (`agree`).
    Raises `BackendUnavailable` where a process has too few devices, and JAX's errors where not all come in time.
    """
    flags = f"--xla_cpu_collective_timeout_seconds={_PATIENCE_SECONDS}"
    flags += f" --xla_cpu_collective_call_terminate_timeout_seconds={_PATIENCE_SECONDS}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    share = devices // count
    jax.config.update("jax_platforms", platform if platform == "cpu" else f"{platform},cpu")
    jax.config.update("jax_num_cpu_devices", share if platform == "cpu" else 1)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        coordinator,
        count,
        index,
        initialization_timeout=timeout_seconds,
        coordinator_bind_address=bind,
        heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=timeout_seconds,
    )
    held = [[d for d in jax.devices(platform) if d.process_index == each] for each in range(count)]
    if few := [(each, len(own)) for each, own in enumerate(held) if len(own) < share]:
        raise BackendUnavailable(
            f"process {few[0][0]} has {few[0][1]} of the {share} devices that the plan gives each of {count} processes"
        )
    return tuple(device for own in held for device in own[:share])


_DTYPES = tuple(
    np.dtype(name)
    for name in (np.float32, ml_dtypes.bfloat16, np.float16, np.int32, np.int8, np.bool_, np.uint8,
                 ml_dtypes.float8_e4m3fn)
)  # fmt: skip
_ABSENT = 255  # in place of a type's number
_MOST_DIMS = 8
_MOST_BYTES = 1 << 30  # of a message


def pack(arrays: Sequence[np.ndarray | None]) -> bytes:
    """Arrays as they travel: how many; a type's number, the number of dims and the dims of each; then their bytes."""
    head, body = [bytes([len(arrays)])], []
    for each in arrays:
        if each is None:
            head.append(bytes([_ABSENT]))
            continue
        head.append(bytes([_DTYPES.index(each.dtype), each.ndim]) + np.array(each.shape, "<i8").tobytes())
        body.append(np.ascontiguousarray(each).tobytes())
    return b"".join(head + body)


def unpack(data: bytes) -> list[np.ndarray | None]:
    """What `pack` was given. Nothing in it is run or looked up. Raises ValueError for anything else."""
    at = 0

    def take(count: int) -> bytes:
        nonlocal at
        if count < 0 or at + count > len(data):
            raise ValueError("a message between processes is cut short")
        at += count
        return data[at - count : at]

    heads: list[tuple[np.dtype, tuple[int, ...]] | None] = []
    for _ in range(take(1)[0]):
        if (number := take(1)[0]) == _ABSENT:
            heads.append(None)
            continue
        dims = take(1)[0]
        if number >= len(_DTYPES) or dims > _MOST_DIMS:
            raise ValueError("a message between processes has no such type or shape")
        shape = tuple(int(size) for size in np.frombuffer(take(8 * dims), "<i8"))
        if any(size < 0 for size in shape):
            raise ValueError("a message between processes has no such type or shape")
        heads.append((_DTYPES[number], shape))
    made = [
        None if head is None else np.frombuffer(take(math.prod(head[1]) * head[0].itemsize), head[0]).reshape(head[1])
        for head in heads
    ]
    if at != len(data):
        raise ValueError("a message between processes is longer than what it holds")
    return made


def send(arrays: Sequence[np.ndarray | None], source: int = 0) -> list[Any]:
    """Host arrays of process `source`, in every process; what the others give is not looked at."""
    mine = source == jax.process_index()
    data = pack(arrays) if mine else b""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(min(len(data), _MOST_BYTES + 1)), mine))
    if not 0 < size <= _MOST_BYTES:  # which all see alike
        raise CapacityError(
            f"process {source} sends more than {_MOST_BYTES >> 20} MiB at once; make its chunks smaller"
        )
    buffer = np.zeros(1 << max(size - 1, 0).bit_length(), np.uint8)  # few sizes: each is a program to compile
    if mine:
        buffer[:size] = np.frombuffer(data, np.uint8)
    whole = np.asarray(multihost_utils.broadcast_one_to_all(buffer, mine))[:size].tobytes()
    try:
        return unpack(whole)
    except ValueError as error:
        raise BackendUnavailable(f"process {source} sends what is no array: {error}") from None


def agree(fingerprint: bytes, key: bytes) -> int | None:
    """The first process that gives other bytes than process 0; None where all are alike. All give as many.

    Raises `BackendUnavailable` where one does not know the key: it has taken the place of one that does.
    """

    def signed(index: int, said: bytes) -> bytes:
        return hmac.digest(key, index.to_bytes(4, "big") + said, "sha256")

    mine = fingerprint + signed(jax.process_index(), fingerprint)
    every = [each.tobytes() for each in multihost_utils.process_allgather(np.frombuffer(mine, np.uint8))]
    said = [each[: len(fingerprint)] for each in every]
    for index, (each, theirs) in enumerate(zip(every, said, strict=True)):
        if not hmac.compare_digest(each[len(fingerprint) :], signed(index, theirs)):
            raise BackendUnavailable(
                f"process {index} is not the one that was let in; start all again, on a closed network"
            )
    return next((index for index, each in enumerate(said) if each != said[0]), None)


class Spread(Hosts):
    """The devices of one stage, some of which may be other processes'."""

    far = True

    def __init__(self, grid: Grid, devices: Sequence[Any]):
        super().__init__(grid, devices)
        self.source: int = devices[0].process_index
        self.here = any(device.process_index == jax.process_index() for device in devices)

    def _put(self, value: np.ndarray, *spec: Any, order: Order | None = None) -> Any:
        def share(index: Any) -> np.ndarray:
            return value[index].copy()  # not a view: that would keep the whole weight

        return jax.make_array_from_callback(value.shape, laid(self._sharding(*spec), order), share)

    def cache(self, value: np.ndarray, split_heads: bool) -> Any:
        return super().cache(value, split_heads) if self.here else None

    def batch(self, value: Any) -> Any:
        return jax.tree.map(lambda leaf: self._put(leaf, "dp"), value) if self.here else value

    def fetch(self, value: Any) -> np.ndarray:
        (found,) = send([self._whole(value)] if self.here else [], self.source)
        return found

    def hand_on(self, value: Carried | None) -> Carried:
        held = [None if leaf is None else self._whole(leaf) for leaf in value] if self.here and value else []
        return Carried(*send(held, self.source))

    def _whole(self, value: Any) -> np.ndarray:
        replicated = jax.jit(_same, out_shardings=self._sharding())(value)  # moves data only: no op of the graph
        return np.asarray(replicated.addressable_data(0))

    def compile(self, backend: Backend, program: Program) -> Executable:
        compiled = super().compile(backend, program) if self.here else _pass_by
        multihost_utils.sync_global_devices("compiled")
        return compiled


def _same(value: Any) -> Any:
    return value


def _pass_by(weights: Any, caches: Any, *rest: Any) -> Any:
    return None, caches


class Processes:
    """The devices of all processes, and the backend they are of. dtype: what they compute in."""

    def __init__(self, backend: Backend, devices: Sequence[Any], dtype: str):
        self.backend, self.devices, self.dtype = backend, devices, dtype

    def cluster(
        self,
        cfg: ModelConfig,
        grid: Grid,
        weights: Mapping[str, Any],
        first: int,
        drafts: int = 0,
        rows: CacheFormats = CacheFormats(),
    ) -> Cluster:
        """A server on the devices from `first` on, as of `Cluster`; weights are read where they are placed only."""
        size = grid.stage_devices
        starts = range(first, first + grid.devices, size)
        stages = [Spread(grid, self.devices[start : start + size]) for start in starts]
        return Cluster(cfg, grid, weights, self.backend, stages, Plain(self.dtype), drafts, rows)
