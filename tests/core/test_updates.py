import pickle
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedweight.core import rows as places
from fedweight.core import updates as module
from fedweight.core.errors import ConfigurationError
from fedweight.core.rows import TILE_ROWS, Rows
from fedweight.core.updates import StackedUpdates

# More rows than a tile has, more columns than one has, and a border inside a tensor.
COLUMNS = 8192
LARGE = (TILE_ROWS + 5, 2 * COLUMNS + 77)


@pytest.fixture(autouse=True, params=["compiled", "plain"], ids=["", "without-numba"])
def _kernels(request, monkeypatch):
    """All of it holds with Numba and without."""
    places.kernels.cache_clear()
    if request.param == "plain":
        monkeypatch.setattr(places, "is_installed", lambda package: False)
    yield
    places.kernels.cache_clear()


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """Tiles of 8,192 columns in float32: the tests need fewer values to fill some."""
    monkeypatch.setattr(module, "TILE_BYTES", 4 * COLUMNS)
    monkeypatch.setattr(module, "SHEET_COLUMNS", COLUMNS // 2)


def draw(k, p, tensors=1, seed=0, dtype=np.float64, **options):
    """Random models; return the updates, and the matrix that they stand for."""
    stream = np.random.default_rng(seed)
    models = stream.normal(size=(k, p)).astype(dtype)
    origin = stream.normal(size=p).astype(dtype)
    cuts = np.sort(stream.integers(0, p + 1, tensors - 1)) if tensors > 1 else []
    offsets = [0, *map(int, cuts), p]
    rows = [torch.from_numpy(model) for model in models]
    stacked = StackedUpdates(rows, torch.from_numpy(origin), offsets, **options)
    return stacked, models.astype(np.float64) - origin.astype(np.float64), offsets


def per_tensor(matrix, offsets, measure):
    parts = [measure(matrix[:, a:b]) for a, b in pairwise(offsets)]
    return np.stack(parts, axis=1)


def l1(matrix):
    return np.abs(matrix).sum(1)


def l2(matrix):
    return np.sqrt((matrix**2).sum(1))


shapes = st.tuples(st.integers(1, 40), st.integers(1, 50), st.integers(1, 4))


def check_all(k, p, tensors, seed, rtol, **options):
    updates, matrix, offsets = draw(k, p, tensors, seed, **options)
    stream = np.random.default_rng(seed + 1)
    w, v = stream.normal(size=k), stream.normal(size=p)
    each = stream.normal(size=(k, tensors))
    near = {"rtol": rtol, "atol": rtol * np.sqrt(k * p) * 10}

    assert (updates.num_clients, updates.num_parameters) == (k, p)
    assert updates.num_tensors == tensors
    np.testing.assert_allclose(updates.combine(torch.tensor(w)), w @ matrix, **near)
    spread = np.repeat(each, np.diff(offsets), axis=1)
    np.testing.assert_allclose(
        updates.combine(torch.tensor(each)), (spread * matrix).sum(0), **near
    )
    np.testing.assert_allclose(updates.dot(torch.tensor(v)), matrix @ v, **near)
    np.testing.assert_allclose(updates.gram(), matrix @ matrix.T, **near)
    for order, norm in ((1, l1), (2, l2)):
        np.testing.assert_allclose(updates.norms(order=order), norm(matrix), **near)
        far = updates.distances(torch.tensor(v), order=order)
        np.testing.assert_allclose(far, norm(matrix - v), **near)
        parts = updates.distances(torch.tensor(v), order=order, per_tensor=True)
        expected = per_tensor(matrix - v, offsets, norm)
        np.testing.assert_allclose(parts, expected, **near)
    columns = list(updates.column_blocks())
    assert [c.start for c, _ in columns] == [0, *(c.stop for c, _ in columns[:-1])]
    np.testing.assert_allclose(torch.cat([b for _, b in columns], 1), matrix, **near)


@given(shapes, st.integers(0, 1000))
@settings(max_examples=50)
def test_equals_numpy(shape, seed):
    check_all(*shape, seed, 1e-12)


@given(shapes, st.integers(0, 1000))
@settings(max_examples=20)
def test_equals_numpy_in_float32(shape, seed):
    check_all(*shape, seed, 1e-6, dtype=np.float32, accumulate="float32")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("tensors", [1, 5])
def test_equals_numpy_over_many_tiles(dtype, tensors):
    check_all(*LARGE, tensors, 3, 1e-11, dtype=dtype, accumulate="float64")


@pytest.mark.parametrize("accumulate", [None, "float32"])
def test_float32_is_summed_in_float32_inside_a_tile_only(accumulate):
    """The sum of many tiles does not lose what one tile's would."""
    check_all(*LARGE, 2, 3, 1e-6, dtype=np.float32, accumulate=accumulate)
    updates, _, _ = draw(3, 10, dtype=np.float32, accumulate=accumulate)
    assert updates.combine(torch.ones(3)).dtype == torch.float32
    assert updates.dot(torch.ones(10)).dtype == torch.float64
    assert updates.norms().dtype == torch.float64


def test_float64_models_are_summed_in_float64():
    check_all(*LARGE, 2, 3, 1e-11)
    updates, _, _ = draw(3, 10)
    assert updates.combine(torch.ones(3)).dtype == torch.float64


def test_float32_is_as_precise_as_the_models():
    """Also where the updates are a thousandth of the models."""
    k, p = 70, 3 * COLUMNS
    stream = np.random.default_rng(0)
    origin = stream.normal(size=p).astype(np.float32)
    steps = 1e-3 * stream.normal(size=(k, p)) + 1e-3 * stream.normal(size=p)
    models = (origin + steps).astype(np.float32)
    exact = models.astype(np.float64) - origin
    updates = StackedUpdates(list(map(torch.from_numpy, models)), torch.tensor(origin))
    w, v = stream.dirichlet(np.ones(k)), exact.mean(0)
    # A few units in the last place of the models' values.
    off = np.abs(updates.combine(torch.tensor(w)).numpy() - w @ exact)
    assert (off / np.abs(models).max(0)).max() < 5 * 2.0**-23
    near = {"rtol": 2e-6}
    np.testing.assert_allclose(updates.dot(torch.tensor(v)), exact @ v, **near)
    np.testing.assert_allclose(updates.gram(), exact @ exact.T, **near)
    for order, norm in ((1, l1), (2, l2)):
        np.testing.assert_allclose(updates.norms(order=order), norm(exact), **near)
        far = updates.distances(torch.tensor(v), order=order)
        np.testing.assert_allclose(far, norm(exact - v), **near)


def test_models_that_did_not_move_combine_to_nearly_nothing():
    origin = torch.randn(100, generator=torch.Generator().manual_seed(0))
    w = torch.full((40,), 1 / 40)
    step = StackedUpdates([origin] * 40, origin).combine(w)
    assert (step.abs() <= 2e-6 * origin.abs()).all()
    assert not StackedUpdates([origin], origin).combine(torch.ones(1)).any()


def results(updates):
    """Everything that can be asked of updates."""
    stream = torch.Generator().manual_seed(1)
    k, p, tensors = updates.num_clients, updates.num_parameters, updates.num_tensors
    w = torch.rand(k, generator=stream, dtype=torch.float64)
    each = torch.rand(k, tensors, generator=stream, dtype=torch.float64)
    v = torch.rand(p, generator=stream, dtype=torch.float64)
    c = torch.rand(k, generator=stream, dtype=torch.float64)
    return [
        updates.combine(w),
        updates.combine(each),
        updates.dot(v),
        updates.dot(weights=w),
        *updates.dot_rest(v, own=c),
        updates.distances(v, order=1),
        updates.distances(v, order=2, per_tensor=True),
        *updates.dot_rest(weights=w, own=c),
        updates.distances(weights=w, order=1),
        updates.distances(weights=w, order=2, per_tensor=True),
        updates.norms(),
        updates.gram(),
        updates.pairwise_distances(),
    ]


def assert_same_bits(one, other):
    for a, b in zip(results(one), results(other), strict=True):
        assert torch.equal(a, b)


every_precision = pytest.mark.parametrize("accumulate", [None, "float64", "float32"])
every_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64])


@every_precision
@every_dtype
def test_threads_never_change_a_bit(accumulate, dtype):
    options = {"dtype": dtype, "accumulate": accumulate}
    one, _, _ = draw(*LARGE, 4, 5, **options, threads=1)
    for threads in (2, 3):
        many, _, _ = draw(*LARGE, 4, 5, **options, threads=threads)
        assert_same_bits(one, many)


@every_precision
@every_dtype
@pytest.mark.parametrize("shape", [LARGE, (7, 1001)])
def test_where_the_rows_lie_never_changes_a_bit(accumulate, dtype, shape):
    """Apart, as rows of a matrix, in any order, at addresses that fit no cache line."""
    apart, _, offsets = draw(*shape, 3, 5, dtype=dtype, accumulate=accumulate)
    k, p = shape
    matrix = torch.stack(apart.models)
    wide = torch.zeros(k, p + 3, dtype=matrix.dtype)
    wide[:, 1:-2] = matrix
    read_only = matrix.numpy().copy()
    read_only.setflags(write=False)
    shifted = torch.zeros(p + 1, dtype=matrix.dtype)
    shifted[1:] = apart.origin
    order = np.random.default_rng(0).permutation(k)
    back, mixed = matrix.flip(0), matrix[order]
    for models, origin in (
        (matrix, apart.origin),
        (list(matrix), apart.origin),
        (list(back)[::-1], apart.origin),
        ([mixed[int(place)] for place in np.argsort(order)], apart.origin),
        (list(wide[:, 1:-2]), shifted[1:]),
        ([torch.from_dlpack(row) for row in read_only], apart.origin),
        (matrix.T.contiguous().T, apart.origin),
    ):
        other = StackedUpdates(models, origin, offsets, accumulate=accumulate)
        assert_same_bits(apart, other)


@every_dtype
def test_what_is_left_of_a_vector_without_a_share_of_each_row(dtype):
    updates, matrix, _ = draw(*LARGE, 2, 5, dtype=dtype)
    v = np.linspace(-1, 1, LARGE[1])
    own = np.linspace(-0.5, 2, LARGE[0])
    rest = v - own[:, None] * matrix
    inner, norms, lengths = updates.dot_rest(torch.tensor(v), own=torch.tensor(own))
    near = {"rtol": 2e-6 if dtype == np.float32 else 1e-13}
    np.testing.assert_allclose(norms, np.linalg.norm(matrix, axis=1), **near)
    np.testing.assert_allclose(lengths, np.linalg.norm(rest, axis=1), **near)
    exact = (matrix * rest).sum(1)
    scale = np.linalg.norm(matrix, axis=1) * np.linalg.norm(rest, axis=1)
    assert (np.abs(inner.numpy() - exact) / scale).max() < near["rtol"]


def test_what_is_left_is_formed_before_it_is_measured():
    """Where one row is 100,000 times as long its square has no digit of the rest."""
    rows = [torch.tensor([1e5, 0.0]), torch.tensor([1.0, 1.0])]
    half = torch.tensor([0.5, 0.5])
    updates = StackedUpdates(rows, torch.zeros(2))
    assert updates.dtype == torch.float32
    inner, norms, lengths = updates.dot_rest(weights=half, own=half)
    cosines = inner / (norms * lengths)
    np.testing.assert_allclose(cosines, [0.5**0.5] * 2, rtol=1e-6)


@every_dtype
def test_distances_between_rows_are_formed_of_differences(dtype):
    updates, matrix, _ = draw(*LARGE, 3, 5, dtype=dtype)
    found = updates.pairwise_distances().numpy()
    exact = np.linalg.norm(matrix[:, None] - matrix[None], axis=2)
    np.testing.assert_allclose(
        found, exact, rtol=1e-5 if dtype == np.float32 else 1e-12
    )
    rows = [torch.full((3,), 1e4), torch.full((3,), 1e4) + torch.tensor([1.0, 0, 0])]
    assert StackedUpdates(rows, torch.zeros(3)).pairwise_distances()[0, 1] == 1


@given(shapes, st.integers(0, 1000), st.data())
@settings(max_examples=60)
def test_which_tensors_any_row_changes(shape, seed, data):
    updates, _, offsets = draw(*shape, seed)
    kept = data.draw(st.sets(st.integers(0, len(offsets) - 2)))
    models = [model.clone() for model in updates.models]
    for tensor in kept:
        here = slice(offsets[tensor], offsets[tensor + 1])
        for model in models:
            model[here] = updates.origin[here]
    found = StackedUpdates(models, updates.origin, offsets).changed.tolist()
    empty = {t for t in range(len(found)) if offsets[t] == offsets[t + 1]}
    assert found == [t not in kept | empty for t in range(len(found))]


@every_precision
@every_dtype
def test_what_is_made_on_the_way_is_what_was_made_before(accumulate, dtype):
    updates, _, _ = draw(*LARGE, 3, 5, dtype=dtype, accumulate=accumulate)
    w = torch.linspace(-1, 2, LARGE[0], dtype=torch.float64)
    point = updates.combine(w)
    assert torch.equal(updates.dot(weights=w), updates.dot(point))
    once = updates.dot_rest(weights=w, own=w)
    for one, two in zip(once, updates.dot_rest(point, own=w), strict=True):
        assert torch.equal(one, two)
    for options in ({"order": 1}, {"order": 2}, {"order": 2, "per_tensor": True}):
        far = updates.distances(weights=w, **options)
        assert torch.equal(far, updates.distances(point, **options))


def test_a_point_is_given_in_one_way():
    updates, _, _ = draw(3, 4)
    rest = partial(updates.dot_rest, own=torch.ones(3))
    for ask in (updates.dot, rest, updates.distances):
        with pytest.raises(ValueError, match="either a vector of parameters or wei"):
            ask(torch.ones(4), weights=torch.ones(3))
        with pytest.raises(
            ValueError, match=r"shape \[4\], a value a param.*got \[3\]"
        ):
            ask(torch.ones(3))
        with pytest.raises(
            ValueError, match=r"weights must have shape \[3\].*got \[4\]"
        ):
            ask(weights=torch.ones(4))
    with pytest.raises(ValueError, match="either a vector of parameters or weights"):
        rest()
    with pytest.raises(ValueError, match=r"own must have shape \[3\].*got \[2\]"):
        updates.dot_rest(torch.ones(4), own=torch.ones(2))


def test_no_rows_are_no_obstacle():
    updates = StackedUpdates([], torch.ones(3))
    assert updates.gram().shape == (0, 0)
    assert updates.combine(torch.ones(0)).tolist() == [0.0, 0.0, 0.0]
    for ask in (updates.dot, updates.distances):
        assert ask(weights=torch.ones(0)).tolist() == []
    assert [block.shape for _, block in updates.column_blocks()] == [(0, 3)]


class Elsewhere(module.Updates):
    """Parts in other places: the arguments travel, all columns are asked for once."""

    def __init__(self, stacked, parts):
        super().__init__(parts, stacked.origin, stacked.offsets, stacked.accumulate)
        self.parts = [Rows([stacked.models[k] for k in rows]) for rows in parts]

    def _ask(self, method, arguments):
        for rows, own in zip(self.parts, arguments, strict=True):
            sent = pickle.loads(pickle.dumps((method, own)))
            yield getattr(rows, sent[0])(*sent[1])


@every_precision
@every_dtype
def test_the_parts_place_never_changes_a_bit(accumulate, dtype):
    stacked, _, _ = draw(*LARGE, 4, 5, dtype=dtype, accumulate=accumulate)
    assert_same_bits(
        stacked, Elsewhere(stacked, [list(rows) for rows in stacked.parts])
    )


@given(st.integers(1, 80), st.integers(1, 6), st.integers(0, 1000))
@settings(max_examples=20)
def test_any_parts_are_the_same_matrix(k, count, seed):
    """In any order, of any size, also of more rows than a tile has."""
    stream = np.random.default_rng(seed)
    order = stream.permutation(k)
    cuts = np.sort(stream.integers(0, k + 1, count - 1))
    parts = [part.tolist() for part in np.split(order, cuts) if len(part)]
    stacked, _, offsets = draw(k, 30, 3, seed)
    other = StackedUpdates(stacked.models, stacked.origin, offsets, parts=parts)
    for one, two in zip(results(stacked), results(other), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-12, atol=1e-10)
    assert_same_bits(other, Elsewhere(stacked, parts))


@pytest.mark.parametrize("parts", [[[0, 1]], [[0, 1], [1, 2]], [[0, 1, 3]]])
def test_every_row_is_in_one_part(parts):
    with pytest.raises(ValueError, match="every row must be in one part"):
        StackedUpdates([torch.zeros(1)] * 3, torch.zeros(1), parts=parts)


def test_small_rows_take_one_thread_by_default(monkeypatch):
    monkeypatch.setattr(module, "num_cores", lambda: 3)
    assert StackedUpdates([torch.ones(3)], torch.zeros(3)).threads == 1
    monkeypatch.setattr(module, "WORTH_THREADS", 2)
    assert StackedUpdates([torch.ones(3)], torch.zeros(3)).threads == 3


def test_a_vectors_place_never_changes_a_bit():
    updates, _, _ = draw(*LARGE, dtype=np.float32)
    v = torch.rand(LARGE[1] + 1, generator=torch.Generator().manual_seed(0))
    moved = v[1:]
    assert torch.equal(updates.dot(moved), updates.dot(moved.clone()))
    assert torch.equal(updates.distances(moved), updates.distances(moved.clone()))


def test_torchs_own_threads_never_change_a_bit():
    before = torch.get_num_threads()
    updates, _, _ = draw(*LARGE)
    w = torch.linspace(0, 1, LARGE[0])
    try:
        found = []
        for n in (1, 4):
            torch.set_num_threads(n)
            found.append((updates.combine(w), updates.gram()))
            assert torch.get_num_threads() == n
    finally:
        torch.set_num_threads(before)
    for one, many in zip(*found, strict=True):
        assert torch.equal(one, many)


def test_nothing_that_was_given_is_changed():
    models = [torch.ones(5), torch.zeros(5)]
    origin, point = torch.full((5,), 0.5), torch.arange(5.0)
    updates = StackedUpdates(models, origin)
    updates.combine(torch.ones(2)).add_(1)
    updates.dot_rest(point, own=torch.ones(2))
    for order in (1, 2):
        updates.distances(point, order=order)
        updates.norms(order=order)
    next(updates.column_blocks())[1].zero_()
    updates.gram()
    assert torch.equal(models[0], torch.ones(5))
    assert torch.equal(models[1], torch.zeros(5))
    assert torch.equal(origin, torch.full((5,), 0.5))
    assert torch.equal(point, torch.arange(5.0))


@pytest.mark.parametrize("size", [0, 1, 1000, 3 << 20])
def test_a_combination_begins_where_a_cache_line_does(size):
    updates = StackedUpdates([torch.ones(size)], torch.zeros(size))
    combined = updates.combine(torch.ones(1))
    assert combined.shape == (size,)
    assert combined.data_ptr() % 64 == 0
    assert bool((combined == 1).all())


def test_a_tensor_without_values_is_no_obstacle():
    updates = StackedUpdates([torch.ones(3)] * 2, torch.zeros(3), [0, 0, 3, 3])
    each = updates.norms(order=1, per_tensor=True)
    assert each.tolist() == [[0.0, 3.0, 0.0]] * 2
    weights = torch.tensor([[9.0, 1.0, 9.0], [9.0, 2.0, 9.0]])
    assert updates.combine(weights).tolist() == [3.0, 3.0, 3.0]


@every_dtype
def test_nan_and_infinity_stay_in_their_row_and_column(dtype):
    k, p = 7, 3000
    updates, _, _ = draw(k, p, dtype=dtype)
    updates.models[2][5], updates.models[4][7] = np.nan, np.inf
    combined = updates.combine(torch.ones(k))
    assert combined[5].isnan()
    assert combined[7] == np.inf
    assert combined.isfinite().sum() == p - 2
    rest = updates.dot_rest(torch.ones(p), own=torch.ones(k))[1:]
    for found in (updates.dot(torch.ones(p)), *rest, updates.norms(order=1)):
        assert found[2].isnan()
        assert found[4] == np.inf
        assert found.isfinite().sum() == k - 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_of_less_precision_are_summed_in_float32(dtype):
    rows = torch.randn(5, 100, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert_same_bits(
        StackedUpdates(rows, rows[0]), StackedUpdates(rows.float(), rows[0].float())
    )


def test_accumulate_is_checked():
    with pytest.raises(ConfigurationError, match="accumulate must be one of"):
        StackedUpdates([], torch.zeros(1), accumulate="float16")
