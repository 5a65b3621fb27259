"Numbers at their limits: small and foreign integer types, extremes, half precision, features of any scale."
import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from torch import tensor

from refcomm import corpora
from refcomm.agents import softrank
from refcomm.agents.softrank import block_means, pool_violators, soft_rank
from refcomm.bottlenecks.continuous import minmax_normalize
from refcomm.bottlenecks.gumbel import GumbelSoftmax
from refcomm.bottlenecks.quantize import LearnedQuantizer, UniformQuantizer
from refcomm.core import ConfigError, generator, integers
from refcomm.data.features import Features, check_features
from refcomm.data.objects import ObjectWorld
from refcomm.metrics import protocol, representation, structure, task
from refcomm.sms.complexity import min_symbols, solve_min_sym

quick = settings(max_examples=50)
NAN = float("nan")


# small and foreign integer types
TORCH = [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64]
FOREIGN = ["u1", ">u2", "<u2", ">i4", "<u4", ">u8", ">i8"]


def kinds(x, most=2**62):
    "The same table in every type that holds it, in another order of bytes, and with strides that run backwards."
    for dtype in TORCH:
        if most <= torch.iinfo(dtype).max: yield x.to(dtype)
    a = x.numpy()
    for dtype in FOREIGN:
        if most <= np.iinfo(dtype).max: yield a.astype(dtype)
    yield np.ascontiguousarray(a[..., ::-1])[..., ::-1]
    yield np.ascontiguousarray(a[::-1])[::-1]
    yield a.tolist()


def draw(n=60, length=4, alphabet=3, seed=0):
    g = generator(seed)
    return torch.randint(alphabet, (n, length), generator=g), torch.randint(3, (n, 2), generator=g)


@pytest.mark.parametrize("name, measure", [
    ("information", lambda s, m: protocol.information(s, m)),
    ("cooccurrence", lambda s, m: protocol.cooccurrence(s, m)),
    ("symbol_counts", lambda s, m: protocol.symbol_counts(s)[1]),
    ("n_unique", lambda s, m: task.n_unique(s)),
    ("topsim", lambda s, m: structure.topographic_similarity(s, m)), ("posdis", lambda s, m: structure.posdis(s, m)),
    ("bosdis", lambda s, m: structure.bosdis(s, m)), ("entropy", lambda s, m: structure.entropy(s)[1]),
    ("jaccard", lambda s, m: structure.jaccard(s, s)), ("distances", lambda s, m: structure.distances(s, "jaccard"))])
def test_a_metric_is_the_same_in_every_integer_type(name, measure):
    symbols, meanings = draw()
    if name == "cooccurrence": meanings = meanings[:, 0]
    expected = measure(symbols, meanings)
    for s, m in zip(kinds(symbols, 3), itertools.cycle(kinds(meanings, 3))):
        torch.testing.assert_close(torch.as_tensor(measure(s, m)), torch.as_tensor(expected), rtol=0, atol=0)


def test_messages_may_come_as_the_channel_sends_them():
    "[n, 6, 1] is six symbols of one word each."
    symbols, meanings = draw(length=6)
    for measure in (structure.topographic_similarity, structure.posdis, structure.bosdis, protocol.information):
        torch.testing.assert_close(torch.as_tensor(measure(symbols[..., None], meanings)),
            torch.as_tensor(measure(symbols, meanings)))
    assert torch.equal(structure.entropy(symbols[..., None])[1], structure.entropy(symbols)[1])
    assert torch.equal(protocol.cooccurrence(symbols[..., None], meanings[:, 0]),
        protocol.cooccurrence(symbols, meanings[:, 0]))
    assert corpora.make_corpus(symbols[..., None], meanings)[0].equal(symbols)
    assert representation.bag_of_symbols(symbols[..., None], meanings[:, 0], symbols[..., None],
        3).equal(representation.bag_of_symbols(symbols, meanings[:, 0], symbols, 3))


@pytest.mark.parametrize("alphabet", [128, 256, 300])
def test_bags_of_packed_symbols(alphabet):
    "`Store` keeps symbols in 8 bits where these suffice, and in them 256 is 0."
    from refcomm.runs.store import packed
    symbols = torch.randint(alphabet, (40, 5), generator=generator(0))
    labels = torch.arange(40) % 2
    expected = representation.bag_of_symbols(symbols, labels, symbols, alphabet)
    for s in (packed(symbols, alphabet), *kinds(symbols, alphabet - 1)):
        assert representation.bag_of_symbols(s, labels.to(torch.uint8), s, alphabet).equal(expected)
    with pytest.raises(ConfigError, match=f"symbols must lie in 0 … {alphabet - 2}"):
        representation.bag_of_symbols(packed(symbols.clamp_min(alphabet - 1), alphabet), labels, symbols, alphabet - 1)


def test_labels_of_eight_bits_and_a_class_more():
    labels = torch.arange(256).to(torch.uint8).repeat(2)
    x = torch.randn(512, 4, generator=generator(0))
    names = [str(i) for i in range(256)]
    assert check_features(Features(x, labels, names, "toy"))
    assert protocol.cooccurrence(labels, labels, 256).equal(2*torch.eye(256, dtype=torch.long))
    assert ObjectWorld(2, 256).ids(torch.tensor([[255, 255]], dtype=torch.uint8)) == 2**16 - 1
    assert representation.knn(x, labels, x, k=1).equal(labels.long())
    target = torch.arange(200, 210).to(torch.uint8)
    scores = torch.rand(10, 256, generator=generator(1))
    for measure in (lambda t: task.expected_accuracy(scores, t, [2, 256]),
        lambda t: task.hits(scores, t, [2, 256], generator(0))):
        assert measure(target).equal(measure(target.long()))


@pytest.mark.parametrize("backend", ["numpy", "numba", "torch"])
def test_complexity_in_every_integer_type(backend):
    if backend == "numba": pytest.importorskip("numba")
    g = generator(0)
    targets, distractors = torch.randint(4, (30, 5), generator=g), torch.randint(4, (30, 6, 5), generator=g)
    expected = min_symbols(targets, distractors)
    for t, d in itertools.product(list(kinds(targets, 3))[:-1], list(kinds(distractors, 3))[:-1]):
        if isinstance(t, np.ndarray) == isinstance(d, np.ndarray):
            assert torch.as_tensor(min_symbols(t, d, backend=backend)).equal(expected)
    mirrored = min_symbols(targets.numpy()[:, ::-1], distractors.numpy()[..., ::-1], backend=backend)
    assert torch.as_tensor(mirrored).equal(min_symbols(targets.flip(-1), distractors.flip(-1)))
    with pytest.raises(ConfigError, match="at least 0"):
        min_symbols(-targets.numpy().astype(">i2"), distractors.numpy(), backend=backend)


@quick
@given(hnp.arrays(st.sampled_from([np.uint8, np.int16, np.dtype(">u2"), np.dtype(">i8")]),
    st.tuples(st.integers(1, 5), st.integers(1, 4)), elements=st.integers(0, 200)))
def test_whole_numbers_are_what_python_says_they_are(a):
    for view in (a, a[::-1], a[:, ::-1], a.T):
        assert integers(view, "x").tolist() == view.tolist() and integers(view, "x").dtype == torch.int64


def test_an_attribute_that_is_absent_is_not_one_that_is_none():
    assert solve_min_sym(dict(a=None, b=1), [dict(b=1)]) == 1 and solve_min_sym(dict(a=None, b=1),
        [dict(a=None, b=2), dict(a=1, b=1)]) == 2


@pytest.mark.parametrize("table", [tensor([[3, 0], [0, 3]]).to(torch.uint8), tensor([[3., 0], [0, 3]]),
    np.array([[3, 0], [0, 3]], ">i2"), [[3, 0], [0, 3]], tensor([[200, 0], [0, 200]]).to(torch.uint8)])
def test_mutual_information_of_tables_of_any_kind(table):
    assert protocol.normalized_mutual_information(table) == 1 and protocol.within_symbol_similarity(table,
        torch.eye(2)) == 1


def test_what_is_no_table_is_one_line():
    for bad in (tensor([[.5, 1], [1, 1]]), [["a"]], [[1], [1, 2]]):
        with pytest.raises(ConfigError, match="counts must be"): protocol.normalized_mutual_information(bad)
    assert task.n_unique(tensor([1, 2, 1])) == 2 and task.n_unique(torch.rand(5, 3, generator=generator(0))) == 5
    for bad in (tensor(3), torch.zeros(0, 3)):
        with pytest.raises(ConfigError, match="n_messages"): task.n_unique(bad)


def test_symbols_far_apart_need_no_table_of_all_between():
    far = tensor([[0], [10**9], [0], [10**9]])
    assert protocol.information(far, far).equal(protocol.information(far.clamp_max(1), far.clamp_max(1)))
    assert structure.posdis(tensor([[0, 10**12], [10**12, 0], [0, 0]]),
        tensor([[0, 1], [1, 0], [0, 0]])) == structure.posdis(tensor([[0, 1], [1, 0], [0, 0]]),
        tensor([[0, 1], [1, 0], [0, 0]]))


# ranks
def exact_ranks(scores):
    "Soft ranks in fractions, by the definition: each block as large as it has to be."
    n, order = len(scores), sorted(range(len(scores)), key=lambda i: -scores[i])
    s = [Fraction(scores[i]) for i in order]
    blocks = []
    for k, v in enumerate(s):
        blocks.append([v - (n - k), 1])
        while len(blocks) > 1 and blocks[-2][0]/blocks[-2][1] <= blocks[-1][0]/blocks[-1][1]:
            total, size = blocks.pop(); blocks[-1][0] += total; blocks[-1][1] += size
    means = [total/size for total, size in blocks for _ in range(size)]
    ranks = [None]*n
    for i, v, m in zip(order, s, means): ranks[i] = float(v - m)
    return ranks


def test_extreme_scores_have_the_ranks_of_their_order():
    for scores, ranks in [([0, 2, -1e9], [2, 3, 1]), ([3e8, 1e8], [2, 1]),
        ([float("inf"), 0, -float("inf")], [3, 2, 1]), ([1e30, -1e30, 1e30], [2.5, 1, 2.5]),
        ([float("inf")]*2 + [0], [2.5, 2.5, 1]), ([3e38, -3e38, 0, .25], [4, 1, 2.375, 2.625])]:
        torch.testing.assert_close(soft_rank(tensor(scores)), tensor(ranks, dtype=torch.float), rtol=0, atol=1e-6)


@quick
@given(st.lists(st.floats(-2.**100, 2.**100, width=32) | st.floats(-5, 5, width=32) | st.sampled_from([1e9, -1e9, 3e8]),
    min_size=1, max_size=9))
def test_ranks_of_any_scores_are_those_of_exact_arithmetic(scores):
    found = soft_rank(tensor(scores))
    torch.testing.assert_close(found, tensor(exact_ranks(scores)), rtol=0, atol=2e-3)
    assert 1 - 1e-3 <= found.min() and found.max() <= len(scores) + 1e-3


def plain_ranks(scores):
    "The same arithmetic without groups: what ordinary scores had before groups were."
    ordered, order = scores.sort(-1, descending=True)
    y = ordered - torch.arange(scores.shape[-1], 0, -1, dtype=scores.dtype)
    block, size = pool_violators(y)
    return torch.empty_like(scores).scatter_(-1, order, ordered - block_means(y, block, size)), order, block, size


@pytest.mark.parametrize("compiled", [False, True])
def test_ordinary_scores_keep_every_bit_of_rank_and_slope(compiled, monkeypatch):
    "In PyTorch's own operations; the compiled loops add up in another order."
    if compiled: pytest.importorskip("numba")
    monkeypatch.setattr(softrank, "have_numba", lambda: compiled)
    near = (lambda a, b: torch.allclose(a, b, atol=1e-3)) if compiled else torch.equal
    for n, spread in itertools.product((1, 2, 7, 49, 196), (.1, 1, 10, 100)):
        x = (spread*torch.randn(64, n, generator=generator(n))).requires_grad_()
        slope = torch.rand(64, n, generator=generator(1))
        ranks, order, block, size = plain_ranks(x.detach())
        found = soft_rank(x)
        found.backward(slope)
        ordered = slope.gather(-1, order)
        assert near(found, ranks) and near(x.grad, torch.empty_like(slope).scatter_(-1, order,
            ordered - block_means(ordered, block, size)))


def test_ranks_of_stacked_members():
    x = torch.randn(3, 5, 7, generator=generator(0), dtype=torch.double)
    x[1, 2, 0] = 1e12
    expected = torch.stack([soft_rank(m) for m in x])
    for dim in (0, 1, -1):
        assert torch.func.vmap(soft_rank, in_dims=dim, out_dims=dim)(x).allclose(expected if dim != -1
            else torch.stack([soft_rank(x[..., i]) for i in range(7)], -1))
    weights = torch.rand(7, generator=generator(1), dtype=torch.double)
    slope = lambda m: torch.func.grad(lambda z: (soft_rank(z)*weights).sum())(m)
    assert torch.func.vmap(slope)(x).allclose(torch.stack([slope(m) for m in x]))
    assert torch.func.vmap(torch.func.vmap(soft_rank))(x).allclose(expected)


def test_a_game_of_patches_can_be_stacked():
    from refcomm.training.ensemble import Ensemble
    members = [torch.nn.Linear(4, 6) for _ in range(3)]
    stacked, x = Ensemble(members), torch.randn(3, 5, 4, generator=generator(0))
    out = stacked.map(lambda m, x: soft_rank(m(x)), x)
    assert out.allclose(torch.stack([soft_rank(m(v)) for m, v in zip(members, x)]), atol=1e-5)
    out[..., 0].sum().backward()
    assert stacked.stacked[0].grad.isfinite().all()


# levels
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.half, torch.float, torch.double])
@pytest.mark.parametrize("make", [lambda: UniformQuantizer(1000, 4000), lambda: LearnedQuantizer(1000, 4000)])
def test_half_precision_reaches_the_levels_that_its_numbers_can_tell(kind, make):
    q, x = make().eval(), torch.linspace(-1, 1, 4000)[None].to(kind)
    sent = q(x)
    assert sent.word.dtype == kind and sent.symbols.equal(q(x.float()).symbols)
    if kind == torch.half: assert len(sent.symbols.unique()) > 990


def test_ordinary_words_keep_every_bit():
    x = torch.randn(50, 20, generator=generator(0))
    word = minmax_normalize(x)
    level = word*9 + ((word*9).round() - word*9)
    assert UniformQuantizer(10, 20)(x).word.equal(level/9) and UniformQuantizer(10, 20)(x).symbols.equal(level.long())


@pytest.mark.parametrize("make", [lambda: UniformQuantizer(10, 4), lambda: LearnedQuantizer(10, 4),
    lambda: GumbelSoftmax(4)])
def test_nan_is_no_symbol(make):
    bad = torch.zeros(2, 4); bad[1, 2] = NAN
    with pytest.raises(ConfigError, match="the sender diverged"): make().eval()(bad)
    if not isinstance(q := make(), GumbelSoftmax): assert q(bad).symbols.min() >= -1
    assert torch.func.vmap(lambda x: make().eval()(x).symbols)(bad[None]).shape[0] == 1, "members that run at once"


def test_nan_is_no_symbol_for_packages_either():
    pytest.importorskip("vector_quantize_pytorch")
    from refcomm.bottlenecks.quantize import FSQ, VQ
    for q in (FSQ(10, 4), VQ(10, 4)):
        with pytest.raises(ConfigError, match="the sender diverged"): q.eval()(torch.full((2, 4), NAN))


# features
def blobs(n=200, seed=0):
    g = generator(seed)
    labels = torch.arange(n) % 3
    return torch.randn(n, 6, generator=g) + 4*torch.nn.functional.one_hot(labels, 6), labels


def test_a_column_that_is_constant_in_training_says_nothing_in_the_test():
    x, labels = blobs()
    with_column = lambda value: torch.cat([x, torch.full((200, 1), value)], 1)
    for train, test in [(.1, .2), (1e4 + .1, 0.), (0., 5.), (-3e-9, 1.)]:
        noisy = with_column(train)
        noisy[::2, -1] = torch.nextafter(noisy[::2, -1], noisy.new_tensor(10.*train))
        for x_train in (with_column(train), noisy):
            probe = representation.linear_probe(x_train, labels, with_column(test), labels, generator(0))
            assert probe.score == representation.linear_probe(x, labels, x, labels, generator(0)).score > .95


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1., 1e15, 1e30])
def test_features_of_any_scale_tell_the_same(scale):
    x, labels = blobs()
    big = x*scale
    assert representation.knn(big, labels, big, k=5).equal(representation.knn(x, labels, x, k=5))
    assert representation.linear_probe(big, labels, big, labels,
        generator(0)).score == pytest.approx(representation.linear_probe(x, labels, x, labels, generator(0)).score,
        abs=.01)
    assert representation.similarity_correlation(big, x) == pytest.approx(1, abs=1e-4)
    groups = representation.Clusters(big, 3, generator(0))(big)
    assert protocol.normalized_mutual_information(protocol.cooccurrence(groups, labels)) > .9
    assert representation.knn(big.double()*1e200, labels, big.double()*1e200,
        k=5).equal(representation.knn(x, labels, x, k=5))


def test_ordinary_features_keep_every_bit():
    x = torch.randn(300, 8, generator=generator(0))
    assert representation._unit(x).equal(torch.nn.functional.normalize(x,
        dim=-1)) and representation._unit(torch.zeros(2, 3)).equal(torch.zeros(2, 3))
    moderate, = representation._moderate(x)
    assert moderate.equal(x)


@quick
@given(st.integers(0, 10_000), st.integers(3, 40))
def test_correlations_never_exceed_one(seed, n):
    g = generator(seed)
    x = torch.randint(3, (n, 2), generator=g)
    for value in (structure.topographic_similarity(x, x),
        structure.topographic_similarity(x, x.double() + 1, meaning_distance="cosine")):
        assert value != value or -1 <= value <= 1
    f = torch.randn(n, 3, generator=g)
    assert representation.similarity_correlation(f, 2*f) <= 1
