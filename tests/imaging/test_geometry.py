"""The pixel budget and the boxes, against the processor that the engine really uses."""

from __future__ import annotations

import random
from collections.abc import Iterator
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as qwen_smart_resize

from ergo_server.imaging.geometry import (
    FACTOR,
    MAX_VISUAL_TOKENS,
    Box,
    PixelBudget,
    Size,
    baseline_visual_tokens,
    smart_resize,
    visual_tokens,
)

BUDGETS = st.integers(4, 16) | st.integers(4, MAX_VISUAL_TOKENS)


@st.composite
def sizes(draw: st.DrawFn, longest: int = 20_000) -> Size:
    """Draw any size within 200 : 1."""
    longer = draw(st.integers(1, longest))
    shorter = draw(st.integers(-(-longer // 200), longer))
    return draw(st.sampled_from((Size(longer, shorter), Size(shorter, longer))))


@st.composite
def boxes(draw: st.DrawFn, size: Size) -> Box:
    """Draw any box inside an image of ``size``."""
    x1, y1 = draw(st.integers(0, size.width - 1)), draw(st.integers(0, size.height - 1))
    return Box(x1, y1, draw(st.integers(x1 + 1, size.width)), draw(st.integers(y1 + 1, size.height)))


def random_sizes(count: int, longest: int = 16_000) -> Iterator[tuple[Size, int]]:
    """Yield sizes and budgets, log-uniform, so that small ones and long ones are met as often as large ones."""
    rng = random.Random(0)
    while count:
        size = Size(int(longest ** rng.random()), int(longest ** rng.random()))
        if size.aspect <= 200:
            count -= 1
            yield size, int(4 * (MAX_VISUAL_TOKENS / 4) ** rng.random())


def processor_size(size: Size, max_visual_tokens: int = MAX_VISUAL_TOKENS) -> Size:
    """Return what the Qwen processor makes of an image."""
    height, width = qwen_smart_resize(size.height, size.width, min_pixels=3136, max_pixels=max_visual_tokens * 784)
    return Size(width, height)


@given(sizes(), BUDGETS)
def test_a_view_never_costs_more_than_the_budget(size: Size, budget: int) -> None:
    """The view's visual tokens are at most the budget, for every size of aspect up to 200 and every budget."""
    assert visual_tokens(PixelBudget(budget).view_size(size)) <= budget


@given(sizes(), BUDGETS)
def test_a_view_is_of_a_size_that_the_processor_keeps(size: Size, budget: int) -> None:
    """What is sent is never resized again, whatever the image and the budget."""
    view = PixelBudget(budget).view_size(size)
    assert processor_size(view) == view


def test_many_random_views_are_kept_by_the_processor() -> None:
    """Twenty thousand log-uniform sizes at log-uniform budgets are within the budget and left alone by the processor."""
    for size, budget in random_sizes(20_000):
        view = smart_resize(size, max_visual_tokens=budget)
        assert processor_size(view) == view, (size, budget)
        assert visual_tokens(view) <= budget, (size, budget)


def test_the_real_processor_makes_the_patches_that_are_counted() -> None:
    """The grid that the real image processor computes of real views is the view's size in patches of 14."""
    processor = Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=MAX_VISUAL_TOKENS * 784)
    for size, budget in random_sizes(48, longest=3000):
        view = smart_resize(size, max_visual_tokens=min(budget, 64))
        grid = processor(Image.new("RGB", view), return_tensors="np")["image_grid_thw"].tolist()
        assert grid == [[1, view.height // 14, view.width // 14]], size
        assert visual_tokens(view) == grid[0][1] * grid[0][2] // 4


def test_the_size_is_the_processors_own_where_that_keeps_the_limits() -> None:
    """Wherever Qwen's arithmetic itself respects budget, minimum and 200 : 1, the view has exactly its size."""
    compared = 0
    for size, budget in random_sizes(20_000):
        theirs = processor_size(size, budget)
        if 4 <= visual_tokens(theirs) <= budget and theirs.aspect <= 200:
            compared += 1
            assert smart_resize(size, max_visual_tokens=budget) == theirs, (size, budget)
    assert compared > 15_000


@pytest.mark.parametrize(
    ("size", "budget", "expected"),
    [
        (Size(4032, 3024), 640, Size(812, 588)),
        (Size(3840, 2160), 1280, Size(1316, 728)),  # the reference's rounding gives 1344 x 756, which is 1296 tokens
        (Size(2250, 1500), 1280, Size(1204, 812)),
        (Size(280, 140), 640, Size(280, 140)),
        (Size(1, 1), 640, Size(56, 56)),
        (Size(200, 1), 640, Size(812, 28)),
        (Size(28, 2000), 49, Size(28, 1372)),  # one column is the least, so the height gives way
        (Size(2000, 28), 49, Size(1372, 28)),
        (Size(270, 140), 5, Size(56, 56)),  # floored, it would be 84 x 28, which the processor enlarges
        (Size(560, 140), 5, Size(112, 28)),
        (Size(140, 560), 5, Size(28, 112)),
        (Size(12_000, 9_000), 16_384, Size(4116, 3080)),
    ],
)
def test_worked_sizes(size: Size, budget: int, expected: Size) -> None:
    """Sizes worked out by hand."""
    assert PixelBudget(budget).view_size(size) == expected


@pytest.mark.parametrize("size", [Size(201, 1), Size(1, 201), Size(4021, 20), Size(0, 10), Size(10, 0)])
def test_impossible_sizes_are_refused(size: Size) -> None:
    """A size without area or longer than 200 : 1 raises ValueError."""
    with pytest.raises(ValueError, match=r"no area|aspect ratio"):
        smart_resize(size)


@pytest.mark.parametrize("budget", [-1, 0, 3, MAX_VISUAL_TOKENS + 1])
def test_impossible_budgets_are_refused(budget: int) -> None:
    """A budget below 4 or above 16,384 visual tokens raises ValueError."""
    with pytest.raises(ValueError, match="max_visual_tokens"):
        PixelBudget(budget)


def test_too_small_a_budget_is_refused_by_the_function_too() -> None:
    """`smart_resize` raises below 4 visual tokens, as no view could be so small."""
    with pytest.raises(ValueError, match="below 4"):
        smart_resize(Size(100, 100), max_visual_tokens=3)


@given(sizes(), BUDGETS)
def test_an_image_that_the_budget_holds_is_not_shrunk(size: Size, budget: int) -> None:
    """The view of an image that fits has lost at most what rounding to a multiple of 28 takes."""
    if PixelBudget(budget).holds(size):
        view = PixelBudget(budget).view_size(size)
        assert max(size.width - view.width, size.height - view.height) <= FACTOR // 2


@given(st.integers(1, 150), st.integers(1, 150), BUDGETS)
def test_an_image_of_whole_tokens_fits_if_they_are_within_the_budget(columns: int, rows: int, budget: int) -> None:
    """For sides that are multiples of 28, fitting is a matter of counting."""
    assert PixelBudget(budget).holds(Size(columns * FACTOR, rows * FACTOR)) == (columns * rows <= budget)


@pytest.mark.parametrize("size", [Size(12_000, 9_000), Size(10, 2000), Size(4032, 3600)])
def test_no_budget_holds_an_image_that_the_processor_itself_shrinks(size: Size) -> None:
    """An image above 16,384 tokens, or thinner than a token and long, is shrunk at any budget, so that zooming helps."""
    assert not PixelBudget(MAX_VISUAL_TOKENS).holds(size)


@given(sizes())
def test_the_baseline_is_capped(size: Size) -> None:
    """The baseline is what the processor would spend, at most 16,384."""
    assert 4 <= baseline_visual_tokens(size) <= MAX_VISUAL_TOKENS


@pytest.mark.parametrize("edges", [(0, 0, 0, 1), (0, 0, 1, 0), (2, 0, 1, 1), (0, 2, 1, 1), (-1, 0, 1, 1), (0, -1, 1, 1)])
def test_no_box_is_empty_or_negative(edges: tuple[int, int, int, int]) -> None:
    """A box without area, with swapped edges or with negative ones cannot be made."""
    with pytest.raises(ValueError, match="is no box"):
        Box(*edges)


@given(st.data(), sizes(), BUDGETS)
def test_the_rescaled_region_covers_the_box(data: st.DataObject, actual: Size, budget: int) -> None:
    """In exact arithmetic the region contains the box, and each of its edges is less than one pixel away."""
    seen = smart_resize(actual, max_visual_tokens=budget)
    box = data.draw(boxes(seen))
    region = box.rescale(seen=seen, actual=actual)
    for axis in (0, 1):
        scale = Fraction(actual[axis], seen[axis])
        assert 0 <= box.edges[axis] * scale - region.edges[axis] < 1
        assert 0 <= region.edges[axis + 2] - box.edges[axis + 2] * scale < 1
    assert region.clamp(actual) == region


@given(st.data(), sizes(), BUDGETS)
def test_there_and_back_moves_no_edge_by_more_than_a_pixel(data: st.DataObject, actual: Size, budget: int) -> None:
    """A box mapped to a larger image and back covers itself and grows by at most one overview pixel an edge."""
    view = smart_resize(actual, max_visual_tokens=budget)
    seen = Size(min(view.width, actual.width), min(view.height, actual.height))
    box = data.draw(boxes(seen))
    back = box.rescale(seen=seen, actual=actual).rescale(seen=actual, actual=seen)
    moved = [there - here for here, there in zip(box.edges, back.edges, strict=True)]
    assert all(-1 <= near <= 0 for near in moved[:2])
    assert all(0 <= far <= 1 for far in moved[2:])


@given(st.data(), sizes(300), sizes(300))
def test_clamp_keeps_the_part_inside(data: st.DataObject, drawn_in: Size, size: Size) -> None:
    """Clamping keeps exactly the pixels of the box that the image has, and gives None where there are none."""
    box = data.draw(boxes(drawn_in))
    clamped = box.clamp(size)
    width, height = min(box.x2, size.width) - box.x1, min(box.y2, size.height) - box.y1
    assert (clamped.size if clamped else None) == (Size(width, height) if width > 0 and height > 0 else None)
    if clamped:
        assert clamped.edges[:2] == box.edges[:2]


@given(st.data(), sizes(3000), st.integers(0, 100), st.integers(0, 100), st.integers(1, 200))
def test_a_grown_box_can_always_be_sent(data: st.DataObject, size: Size, pad_x: int, pad_y: int, min_side: int) -> None:
    """A grown box covers the box, lies in the image, is within 200 : 1, and has the shortest side wherever the image has it."""
    box = data.draw(boxes(size))
    grown = box.grown(pad_x, pad_y, min_side, size)
    assert grown.clamp(size) == grown
    assert max(grown.size) <= 200 * min(grown.size)
    assert grown.x1 <= max(0, box.x1 - pad_x)
    assert grown.y1 <= max(0, box.y1 - pad_y)
    assert grown.x2 >= min(size.width, box.x2 + pad_x)
    assert grown.y2 >= min(size.height, box.y2 + pad_y)
    assert all(side >= min(min_side, end) for side, end in zip(grown.size, size, strict=True))


@given(st.data(), sizes(3000))
def test_a_box_that_needs_no_growing_stays(data: st.DataObject, size: Size) -> None:
    """Without padding, a box within 200 : 1 is returned as it is."""
    box = data.draw(boxes(size))
    assert (box.grown(0, 0, 1, size) == box) == (max(box.size) <= 200 * min(box.size))


def test_worked_boxes() -> None:
    """Boxes worked out by hand."""
    size = Size(1000, 500)
    assert Box(10, 10, 20, 20).rescale(seen=Size(100, 100), actual=size) == Box(100, 50, 200, 100)
    assert Box(1, 1, 2, 2).rescale(seen=Size(3, 3), actual=size) == Box(333, 166, 667, 334)
    assert Box(900, 0, 1100, 500).clamp(size) == Box(900, 0, 1000, 500)
    assert Box(1000, 0, 1100, 500).clamp(size) is None
    assert Box(0, 100, 1000, 101).grown(0, 0, 1, size) == Box(0, 98, 1000, 103)
    assert Box(990, 490, 1000, 500).grown(0, 0, 40, size) == Box(960, 460, 1000, 500)
    assert Box(0, 0, 500, 250).area_ratio(size) == 0.25
    assert Box(100, 50, 500, 250).normalized(size) == (0.1, 0.1, 0.5, 0.5)
    assert Box.whole(size).area_ratio(size) == 1.0
