"""The device contract: what a backend is asked, in one file.

Data flows one way: a `Program` (a function of the graph with abstract arguments) is exported to an
`Artifact` (bytes), and an artifact is loaded into an executable; what runs is what was exported.
A program of several devices takes the same way: it is one device's function, into which the backend puts its
kernels, and what spreads it over all of them. Capabilities are asked before anything is compiled, and never the
backend's name. A host without the device can still export for it: `devices` is empty there and `load` says why it
cannot run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

from backends.errors import ArtifactError, BackendError, Unsupported
from foundation.reading import Unreadable, parse_json
from model.weights import Weight

_MAGIC, _ARTIFACT_VERSION = b"GLM5ART\n", 3

Order = tuple[int, ...]
"""How an array lies in memory: its dims from the major to the minor. None instead: as its shape has them."""


@dataclasses.dataclass(frozen=True)
class DeviceInfo:
    """One device. `memory_bytes` is None where the runtime does not tell."""

    id: int
    kind: str
    memory_bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class Capabilities:
    """What an adapter offers on this host.

    platform: what its artifacts are compiled for. devices: empty on an export-only host. dtypes: types it
    computes in. preferred_dtype: the one to take when the user names none. fp8_weights: matrices may stay
    in FP8. donation: a program may reuse its input buffers for outputs. dlpack: buffers are exchanged
    without a copy. cache_rows: formats (names of `model.formats.ROWS`) that a program may keep cache rows in besides
    `dtypes`. apart: a program runs while the host does other work, and its results have to be fetched. programs:
    kept loaded at once by what serves, for each holds memory of the host, or of the device. out_in: ops whose matrices
    are to lie in memory as checkpoints have them, [out, in], and not as the graph has them, [in, out]; shapes stay.
    """

    platform: str
    devices: tuple[DeviceInfo, ...]
    dtypes: frozenset[str]
    preferred_dtype: str
    fp8_weights: bool
    donation: bool
    dlpack: bool
    cache_rows: frozenset[str] = frozenset()
    apart: bool = False
    programs: int = 64
    out_in: frozenset[str] = frozenset()

    def order(self, weight: Weight) -> Order | None:
        """How a weight is to lie, as `Backend.put` takes it. Scales lie as their matrix does."""
        return weight.out_in if weight.op in self.out_in else None


@dataclasses.dataclass(frozen=True)
class Program:
    """A function to compile: `fn(*args)` with `args` a tuple of trees of `jax.ShapeDtypeStruct`.

    `donate`: positions of arguments whose buffers the outputs may take over. `needs`: the capabilities
    without which it cannot run ("float32", "bfloat16", "fp8_weights"). `optimise`: False where it is over so soon
    that optimising it would take longer than that saves.

    `spread`: for several devices. `fn` is then what each of them runs, finding the others by the names of axes, and
    `spread(fn)` is the function of `args` that all of them run together. `mesh`: their axes with sizes, outermost
    first, where they are devices of the backend; `args` then carry shardings over it. Without a mesh one device
    stands for all.

    `orders`: how the leaves of `args` lie, one behind the other (`Backend.order_of`); all as their shapes by default.
    What is loaded takes buffers that lie so, and no others.
    """

    name: str
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    donate: tuple[int, ...] = ()
    needs: frozenset[str] = frozenset()
    optimise: bool = True
    spread: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None
    mesh: Mapping[str, int] = dataclasses.field(default_factory=dict)
    orders: tuple[Order | None, ...] = ()


@dataclasses.dataclass(frozen=True)
class Artifact:
    """An exported program: `payload` in the platform's format, with what loading it must know (see `Program`)."""

    name: str
    platform: str
    format: str
    donate: tuple[int, ...]
    versions: Mapping[str, str]
    payload: bytes
    optimise: bool = True
    mesh: Mapping[str, int] = dataclasses.field(default_factory=dict)
    orders: tuple[Order | None, ...] = ()

    @property
    def devices(self) -> int:
        """How many run it together."""
        return math.prod(self.mesh.values())

    def to_bytes(self) -> bytes:
        """A self-checking file: magic, header length, JSON header with the payload's hash, payload."""
        header = {
            "version": _ARTIFACT_VERSION,
            "name": self.name,
            "platform": self.platform,
            "format": self.format,
            "donate": list(self.donate),
            "versions": dict(self.versions),
            "optimise": self.optimise,
            "mesh": dict(self.mesh),
            "orders": self.orders,
            "sha256": hashlib.sha256(self.payload).hexdigest(),
        }
        encoded = json.dumps(header).encode()
        return _MAGIC + len(encoded).to_bytes(8, "little") + encoded + self.payload

    @classmethod
    def from_bytes(cls, data: bytes) -> Artifact:
        """Raises `ArtifactError` where the data are not a whole artifact of this version."""
        start = len(_MAGIC) + 8
        try:
            if data[: len(_MAGIC)] != _MAGIC:
                raise ValueError
            size = int.from_bytes(data[len(_MAGIC) : start], "little")
            header = parse_json(data[start : start + size].decode())
            payload = data[start + size :]
            if (version := header["version"]) != _ARTIFACT_VERSION:
                raise ArtifactError(
                    f"artifact version {version}, this release reads {_ARTIFACT_VERSION}; export it again"
                )
            whole = header["sha256"] == hashlib.sha256(payload).hexdigest()
            name, platform, fmt = header["name"], header["platform"], header["format"]
            found = cls(
                name, platform, fmt, tuple(header["donate"]), header["versions"], payload, header["optimise"],
                header["mesh"], tuple(None if order is None else tuple(order) for order in header["orders"]),
            )  # fmt: skip
        except (Unreadable, ValueError, KeyError, TypeError):
            raise ArtifactError("not an artifact, or its header is damaged; export it again") from None
        if not whole:
            raise ArtifactError(f"artifact {name} is truncated or altered (hash mismatch); export it again")
        return found


class Executable(Protocol):
    """A loaded program. Arguments and results are trees of the backend's buffers; donated arguments must
    not be used again."""

    def __call__(self, *args: Any) -> Any: ...


class Backend(ABC):
    """An adapter. Constructing one is cheap and never fails for lack of a device."""

    name: ClassVar[str]
    summary: ClassVar[str]
    emulates: ClassVar[bool] = False
    """Whether it runs a plan on emulated devices of a profile, instead of on devices of its own."""
    spreads: ClassVar[bool] = False
    """Whether it runs a plan on the devices of several processes."""
    custom_calls: ClassVar[tuple[str, ...]] = ()
    """Code of its runtime that its kernels call by name, as far as exports have to allow it."""

    @abstractmethod
    def unavailable(self) -> str | None:
        """Why programs cannot run here, or None when they can."""

    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What the adapter offers on this host."""

    def lowerings(self) -> Mapping[str, Callable[..., Any]]:
        """Own kernels by op name; other ops run their decompositions."""
        return {}

    def op_notes(self) -> Mapping[str, str]:
        """For every op of the contract, whether a kernel of its own runs it, and which calls or why not."""
        from model.ops import OPS  # the registry of adapters must not wait for JAX

        own = self.lowerings()
        return {name: "kernel" if name in own else "decomposition" for name in OPS}

    def check(self, program: Program) -> None:
        """Raises `Unsupported` where the program needs a capability that is not offered."""
        if program.spread and not (self.spreads or self.emulates):
            raise Unsupported(f"backend {self.name} cannot run {program.name}: it runs programs of one device only")
        offered = self.capabilities()
        have = offered.dtypes | ({"fp8_weights"} if offered.fp8_weights else set())
        if missing := sorted(program.needs - have):
            raise Unsupported(
                f"backend {self.name} cannot run {program.name}: it lacks {', '.join(missing)} "
                f"(it offers {', '.join(sorted(have))})"
            )

    @abstractmethod
    def export(self, program: Program) -> Artifact:
        """Compiles the program for the platform, as far as can be done without the device."""

    @abstractmethod
    def load(self, artifact: Artifact, devices: Sequence[Any] = ()) -> Executable:
        """Raises `BackendUnavailable` without a device, `ArtifactError` for another platform's artifact.

        devices: the runtime's own, in the order of the artifact's mesh, where it has one.
        """

    def exhausted(self, error: Exception) -> bool:
        """Whether what an executable or `get` raised says that memory ran out."""
        return isinstance(error, MemoryError)

    def explain(self, error: Exception) -> BackendError | None:
        """What an executable or `get` raised as a line that says what to do, where that can be told."""
        return None

    @abstractmethod
    def put(self, array: Any, order: Order | None = None) -> Any:
        """A host array (numpy) as a device buffer, of the same shape however it is to lie."""

    def order_of(self, buffer: Any) -> Order | None:
        """How a buffer lies, where not as its shape has it."""
        return None

    @abstractmethod
    def zeros(self, shape: tuple[int, ...], dtype: str) -> Any:
        """A zeroed device buffer."""

    @abstractmethod
    def get(self, buffer: Any) -> Any:
        """A device buffer as a numpy array; waits for it."""

    @abstractmethod
    def from_dlpack(self, tensor: Any) -> Any:
        """A tensor of another library (anything with `__dlpack__`) as a buffer, without a copy where the
        devices agree. Buffers themselves have `__dlpack__`, which is the way back."""
