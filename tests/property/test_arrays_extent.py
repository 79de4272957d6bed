"""The blocks that a strided view touches, against a look at every item of it."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from userfault.arrays.extent import block_runs

LARGEST = 1 << 20  # no view reaches farther down than this

strides = st.one_of(st.integers(-40, 40), st.integers(-400, 400))
dimensions = st.lists(st.tuples(st.integers(0, 6), strides), max_size=4)


def brute_force(
    offset: int, shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, block_size: int
) -> list[tuple[int, int]]:
    """Look at each item."""
    touched: set[int] = set()
    for index in np.ndindex(*shape):
        start = offset + sum(i * stride for i, stride in zip(index, strides, strict=True))
        touched.update(range(start // block_size, (start + itemsize - 1) // block_size + 1))
    return runs(touched)


def runs(blocks: set[int]) -> list[tuple[int, int]]:
    groups = itertools.groupby(enumerate(sorted(blocks)), lambda pair: pair[1] - pair[0])
    members = [[block for _, block in group] for _, group in groups]
    return [(group[0], group[-1] + 1) for group in members]


@settings(max_examples=500, deadline=None)
@given(offset=st.integers(0, 300), dimensions=dimensions, itemsize=st.integers(1, 70), block=st.integers(1, 64))
def test_any_strides(offset: int, dimensions: list[tuple[int, int]], itemsize: int, block: int) -> None:
    shape, steps = tuple(n for n, _ in dimensions), tuple(stride for _, stride in dimensions)
    start = LARGEST * block + offset

    assert block_runs(start, shape, steps, itemsize, block) == brute_force(start, shape, steps, itemsize, block)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), shape=hnp.array_shapes(max_dims=4, max_side=7), block=st.sampled_from([4, 16, 64]))
def test_whatever_numpy_cuts_out_of_an_array(data: st.DataObject, shape: tuple[int, ...], block: int) -> None:
    order = data.draw(st.sampled_from("CF"))
    whole = np.zeros(shape, "u2", order=order)  # type: ignore[call-overload]  # a letter that is drawn
    part = whole[data.draw(hnp.basic_indices(shape, allow_ellipsis=True, allow_newaxis=True))]
    view = np.asarray(part).transpose(data.draw(st.permutations(range(np.ndim(part)))))
    if data.draw(st.booleans()):
        view = np.broadcast_to(view, (3, *view.shape))
    if not np.shares_memory(view, whole):  # an item, which is a copy, or nothing
        return
    offset = view.__array_interface__["data"][0] - whole.__array_interface__["data"][0]

    expected = brute_force(offset, view.shape, view.strides, view.itemsize, block)

    assert block_runs(offset, view.shape, view.strides, view.itemsize, block) == expected
