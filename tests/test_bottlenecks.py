"Bottlenecks and channels against slow, obvious references."
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays

from refcomm.bottlenecks.continuous import Continuous, minmax_normalize
from refcomm.bottlenecks.gumbel import GumbelSoftmax
from refcomm.bottlenecks.quantize import UniformQuantizer, reachable_words
from refcomm.channels import CELLS, Recurrent, make_bottleneck, make_channel
from refcomm.core import ConfigError, generator, seeded_init

words = arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 8)), elements=st.floats(-1e3, 1e3, width=32))


@given(words)
def test_normaliser_is_the_formula_message_by_message(x):
    for row, ours in zip(x.astype(np.float64), minmax_normalize(torch.from_numpy(x)).numpy()):
        shifted = row.astype(np.float32) - row.astype(np.float32).min()
        expected = shifted / shifted.max() if shifted.max() > 0 else np.full_like(shifted, .5)
        np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-7)


@given(words, st.floats(.5, 4), st.floats(-10, 10))
def test_normaliser_ignores_shift_and_scale(x, scale, shift):
    x = torch.from_numpy(x).double()
    spread = x.amax(-1) - x.amin(-1)
    keep = spread > 1e-3
    torch.testing.assert_close(minmax_normalize(x*scale + shift)[keep], minmax_normalize(x)[keep], atol=1e-6, rtol=0)


@given(words, st.integers(2, 64), st.sampled_from(["exact", "paper"]))
def test_quantiser_sends_the_nearest_level(x, v, grid):
    q = UniformQuantizer(v, x.shape[1], grid=grid)
    levels = np.linspace(0, 1, v + (grid == "paper"))
    sent, m = q(torch.from_numpy(x)), minmax_normalize(torch.from_numpy(x)).numpy()
    assert q.alphabet_size == len(levels)
    np.testing.assert_allclose(sent.word, levels[sent.symbols], atol=1e-6)
    distance = np.abs(m[..., None] - levels)
    np.testing.assert_allclose(np.abs(m - sent.word.numpy()), distance.min(-1), atol=1e-5)


@given(words, st.integers(2, 64))
def test_without_straight_through_the_gradient_is_that_of_rounding(x, v):
    x = torch.from_numpy(x).requires_grad_()
    reference = (minmax_normalize(x) * (v - 1)).round() / (v - 1)
    zero, = torch.autograd.grad(reference.sum(), x)
    sent = UniformQuantizer(v, x.shape[1], gradient="none")(x)
    assert torch.equal(zero, torch.zeros_like(x)) and not sent.word.requires_grad
    torch.testing.assert_close(sent.word, reference.detach())
    torch.testing.assert_close(sent.word, UniformQuantizer(v, x.shape[1])(x).word.detach())


@settings(max_examples=30)
@given(st.integers(2, 5), st.integers(1, 5))
def test_reachable_words_by_enumeration(v, w):
    words = np.stack(np.meshgrid(*[np.arange(v)]*w, indexing="ij"), -1).reshape(-1, w)
    both_ends = ((words == 0).any(1) & (words == v - 1).any(1)).sum()
    assert reachable_words(v, w) == both_ends + 1


def test_gumbel_softmax_matches_torch():
    logits, g = torch.randn(6, 9), GumbelSoftmax(9, temperature=.7)
    noise = g.draw_noise((6,), generator(0))
    torch.testing.assert_close(g(logits, noise).word, torch.softmax((logits + noise)/.7, -1))
    hard = GumbelSoftmax(9, straight_through=True)(logits, noise).word
    assert torch.equal(hard.argmax(-1), (logits + noise).argmax(-1)) and torch.allclose(hard.amax(-1), torch.ones(6))
    evaluated = g.eval()(logits, noise)
    assert torch.equal(evaluated.symbols[:, 0], logits.argmax(-1)), "no noise at evaluation"


def naive_recurrent(channel, u, noise):
    "The channel step by step with torch's own cells: embed, cell, read out, feed back."
    lstm = channel.speaker.n_states == 2
    word_in, state = channel.first.expand(len(u), -1), (u, torch.zeros_like(u)) if lstm else u
    words = []
    for i in range(channel.message_length):
        state = channel.speaker.cell(word_in, state)
        sent = channel.bottleneck(channel.speak(state[0] if lstm else state), None if noise is None else noise[:, i])
        words.append(sent.word)
        word_in = channel.speaker.embed(sent.word)
    h = torch.zeros_like(u)
    state = (h, h) if lstm else h
    for w in words: state = channel.listener.cell(channel.listener.embed(w), state)
    return torch.stack(words, 1), state[0] if lstm else state


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("bottleneck",
    [("continuous", dict(word_length=6)), ("gumbel", dict(alphabet_size=6)),
    ("quantized", dict(alphabet_size=3, word_length=6))], ids=lambda b: b[0])
def test_recurrent_equals_step_by_step(cell, bottleneck):
    with seeded_init(0):
        channel = Recurrent(make_bottleneck(bottleneck[0], **bottleneck[1]), 4, hidden=10, embedding=7,
            cell=cell).double()
    u = torch.randn(5, 10, dtype=torch.double)
    noise = channel.draw_noise(5, generator(0))
    words = channel.send(u, noise).word
    slow_words, slow_z = naive_recurrent(channel, u, noise)
    torch.testing.assert_close(words, slow_words)
    torch.testing.assert_close(channel.receive(words), slow_z)
    used = list(channel.parameters())
    for a, b in zip(torch.autograd.grad(channel.receive(words).pow(2).sum(), used),
        torch.autograd.grad(slow_z.pow(2).sum(), used)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("channel, length", [("instant", 1), ("recurrent", 3)])
@pytest.mark.parametrize("name, sizes, symbols, alphabet",
    [("continuous", dict(word_length=4), 4, None), ("gumbel", dict(alphabet_size=5), 1, 5),
    ("quantized", dict(alphabet_size=5, word_length=4), 4, 5), ("fsq", dict(alphabet_size=5, word_length=4), 4, 5),
    ("vq", dict(alphabet_size=5, word_length=4), 4, 5)])
def test_capacity(channel, length, name, sizes, symbols, alphabet):
    extra = dict(message_length=3, hidden=8, embedding=8) if channel == "recurrent" else {}
    c = make_channel(channel, make_bottleneck(name, **sizes), **extra)
    assert c.symbols_per_message == symbols*length
    assert c.n_messages == (math.inf if alphabet is None else alphabet**(symbols*length))
    assert c.capacity_bits == pytest.approx(math.inf if alphabet is None else symbols*length*math.log2(5))
    sent = c.send(torch.randn(2, c.dim), c.draw_noise(2, generator(0)))
    assert sent.symbols is None if alphabet is None else sent.symbols.shape == (2, length, symbols)


@pytest.mark.parametrize("make, says", [
    (lambda: UniformQuantizer(alphabet_size=1), "alphabet_size must be at least 2, got 1"),
    (lambda: GumbelSoftmax(alphabet_size=1), "alphabet_size must be at least 2, got 1"),
    (lambda: Continuous(word_length=0), "word_length must be at least 1, got 0"),
    (lambda: UniformQuantizer(word_length=-3), "word_length must be at least 1, got -3"),
    (lambda: GumbelSoftmax(temperature=-1.), "temperature must be above 0, got -1.0"),
    (lambda: UniformQuantizer(when="trainin"), "unknown when 'trainin'"),
    (lambda: Recurrent(Continuous(3), cell="gur"), "did you mean 'gru'"),
    (lambda: make_channel("recurent", Continuous(3)), "did you mean 'recurrent'"),
])
def test_bad_settings_are_named(make, says):
    with pytest.raises(ConfigError, match=says): make()
