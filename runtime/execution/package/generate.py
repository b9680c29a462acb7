"""Tokens from an exported package: prompts in, completions out, as the engine gives them."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import tokenizers

from backends.errors import ArtifactError
from foundation.child import ChildFailure
from foundation.errors import CapacityError, UsageError
from foundation.foreign_text import MOST_BYTES, ForeignTokenizer, is_tame
from foundation.reading import Unreadable, read_text
from foundation.streaming import TextStream
from runtime.deployment.manifest import FILE, MOST_STEP, GearUnits, Manifest, Value, check_files
from runtime.deployment.tensors import numpy_dtype
from runtime.execution.local.request import Completion, OnToken, Prompt
from runtime.execution.package.executor import executor, refusing
from runtime.execution.package.room import room_bytes, within_room
from runtime.execution.package.runner import Runner, stored_weights
from runtime.execution.package.steps import PackageExecutor
from runtime.execution.serve_all import serve_all
from runtime.serving.request import check_asked, check_ids


class Package:
    """A package, checked and loaded into a runtime ("ort", "torch", "xla"); `linked` as of `Runner`.

    trusted: graphs that may run code, or crash the runtime, are opened too.

    Raises `ArtifactError` for a package that is damaged, of another version or without weights, `UsageError` for a
    runtime that does not run its format.
    """

    def __init__(self, folder: Path, backend: str, linked: bool = True, trusted: bool = False):
        self.folder, self.manifest = folder, Manifest.read(folder)
        runtime = executor(backend, self.manifest.format, trusted)
        check_files(folder, self.manifest)
        weights = stored_weights(folder, self.manifest)
        if weights is None:
            raise ArtifactError(f"{folder}: holds no weights; to run it here, export it with --weights external")
        runtime.admit(folder, self.manifest)
        _check_sizes(folder, self.manifest)
        with refusing(folder / FILE, "the runner"):
            self.runner = Runner(folder, self.manifest, runtime, weights, linked)
        self._held_bytes = None if trusted else _held_bytes(self.manifest)
        self.executor = PackageExecutor(self.runner, self._bounded)
        self.text = Text(folder / self.manifest.tokenizer) if self.manifest.tokenizer else None

    @property
    def stop_ids(self) -> frozenset[int]:
        return frozenset(self.manifest.model.stop_token_ids)

    @property
    def compile_s(self) -> float:
        """Spent on loading graphs so far."""
        return self.runner.load_s

    def generate(self, requests: Sequence[Prompt], on_token: OnToken = lambda i, t: None) -> list[Completion]:
        """Serves the requests. Raises `UsageError` for one that no gear holds."""
        for request in requests:
            self._check(request)
        asked = [dataclasses.replace(request, keep_logits=False) for request in requests]
        found, *_ = serve_all(asked, self.executor.deployment(), self.executor, lambda: self.runner.load_s, on_token)
        return found

    def _check(self, request: Prompt) -> None:
        ids = request.prompt_ids
        check_asked(len(ids), request.max_tokens)
        check_ids(ids, self.manifest.model.vocab_size)
        total, largest = len(ids) + request.max_tokens, self.executor.largest_context
        if total > largest:
            raise UsageError(
                f"prompt ({len(ids)} tokens) + max-tokens ({request.max_tokens}) = {total} exceeds the package's "
                f"largest gear, a context of {largest}; shorten one of them, or export with a larger --context"
            )

    def _bounded(self, program: GearUnits) -> AbstractContextManager[None]:
        if self._held_bytes is None:
            return nullcontext()
        most = room_bytes(program.gear, self.manifest.page_size, self._held_bytes)
        return within_room(self.folder, most)


def _held_bytes(manifest: Manifest) -> int:
    """Bytes of the files and the caches of all devices."""
    return sum(file.bytes for file in manifest.files.values()) + _cache_bytes(manifest)


def _cache_bytes(manifest: Manifest) -> int:
    each = {unit: sum(map(_bytes, caches)) for unit, caches in manifest.caches.items()}
    layers = {layer.index: layer.unit for layer in manifest.layers}
    return sum(each[layers[layer]] for device in manifest.devices for layer in device.layers)


def _check_sizes(folder: Path, manifest: Manifest) -> None:
    """Raises `ArtifactError` for sizes that are none, or for caches that this host cannot hold."""
    where = folder / FILE
    if not manifest.programs or manifest.page_size < 1:
        raise ArtifactError(f"{where}: has no programs, or pages of no tokens; export the package again")
    for number, program in enumerate(manifest.programs):
        b, t, pages = dataclasses.astuple(program.gear)
        if min(b, t, pages) < 1 or b * max(t, pages) > MOST_STEP:
            raise ArtifactError(
                f"{where}: programs[{number}].gear: sizes of 1 to {MOST_STEP:,} in all; export it again"
            )
    with refusing(where, "the runner"):
        held = _cache_bytes(manifest)
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if held > there:
        raise CapacityError(
            f"{where}: caches of {held / 1e9:,.1f} GB, and this host has {there / 1e9:,.1f} GB of memory"
        )


def _bytes(value: Value) -> int:
    if min(value.shape, default=1) < 1:
        raise ValueError(f"{value.name} has the shape {list(value.shape)}")
    return math.prod(value.shape) * numpy_dtype(value.dtype).itemsize


class Text:
    """The package's tokenizer, at work as that of a checkpoint is. Raises `ArtifactError` for a file that is none."""

    def __init__(self, path: Path):
        self._path = path
        try:
            text = read_text(path, MOST_BYTES)
        except Unreadable as error:
            raise ArtifactError(f"{path}: cannot be read ({error})") from None
        with self._named("not a tokenizer"):
            self._foreign = ForeignTokenizer(text)
        self._inner = tokenizers.Tokenizer.from_str(text)
        self._decodes_here = is_tame(self._inner.decoder)

    def encode_each(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of plain prompts, with what the tokenizer puts around one."""
        try:
            for text in texts:
                text.encode()
        except UnicodeEncodeError:
            raise UsageError("the text is not valid Unicode") from None
        with self._named("cannot encode the text"):
            return self._foreign.encode(texts, add_special_tokens=True)

    def decode(self, ids: Sequence[int]) -> str:
        if self._decodes_here:
            return self._inner.decode(list(ids), skip_special_tokens=False)
        with self._named("cannot decode"):
            return self._foreign.decode(ids, skip_special_tokens=False)

    def stream(self) -> TextStream:
        return TextStream(self.decode, self._inner)

    @contextmanager
    def _named(self, what: str) -> Iterator[None]:
        try:
            yield
        except ChildFailure as error:
            raise ArtifactError(f"{self._path}: {what} ({error})") from None
