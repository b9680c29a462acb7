"""What processes send each other: arrays come back to the bit, and no bytes are anything but arrays or refused."""

from __future__ import annotations

import contextlib

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from backends.spmd.processes import pack, unpack

TYPES = [np.dtype(each) for each in (np.float32, ml_dtypes.bfloat16, np.int32, np.int8, np.bool_)]


@st.composite
def messages(draw: st.DrawFn) -> list[np.ndarray | None]:
    def one() -> np.ndarray | None:
        if draw(st.booleans()):
            return None
        kind = draw(st.sampled_from(TYPES))
        shape = draw(array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
        words = draw(arrays(np.uint8, (*shape, kind.itemsize)))
        return (words[..., 0] > 127) if kind == np.bool_ else words.view(kind).reshape(shape)

    return [one() for _ in range(draw(st.integers(0, 3)))]


@given(messages())
def test_what_is_sent_arrives(message: list[np.ndarray | None]) -> None:
    found = unpack(pack(message))
    assert len(found) == len(message)
    for ours, theirs in zip(found, message, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert (ours.dtype, ours.shape, ours.tobytes()) == (theirs.dtype, theirs.shape, theirs.tobytes())


@given(messages(), st.data())
def test_other_bytes_are_refused_or_are_arrays(message: list[np.ndarray | None], data: st.DataObject) -> None:
    sent = bytearray(pack(message))
    at = data.draw(st.integers(0, len(sent) - 1))
    sent[at] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ValueError):
        assert sum(0 if each is None else each.nbytes for each in unpack(bytes(sent))) <= len(sent)
    with pytest.raises(ValueError, match="between processes"):
        unpack(bytes(pack(message))[:-1])


@given(st.binary(max_size=60))
def test_any_bytes(sent: bytes) -> None:
    with contextlib.suppress(ValueError):
        unpack(sent)
