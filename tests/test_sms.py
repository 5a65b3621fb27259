"The experiment of sms: what its sender learns from, what is measured, and what is refused."
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from refcomm.agents.encoders import LinearEncoder
from refcomm.bottlenecks.reinforce import Reinforce, score_function_loss
from refcomm.channels import Recurrent
from refcomm.core import ConfigError, generator, seeded_init
from refcomm.papers.sms import run as sms
from refcomm.games.tasks import Valued
from refcomm.papers.sms import items as grids
from refcomm.papers.sms.spec import BOTTLENECKS
from refcomm.metrics.protocol import effective_number, exchange, information
from refcomm.runs.execute import Context

QUIET = Context("cpu", None, lambda *a: None)


def tiny(**changes):
    return dataclasses.replace(grids.grid("figure2", "smoke", 1)[1], **changes)


def test_reinforce_estimates_the_gradient_of_the_expected_loss():
    "Against the exact gradient, by enumerating all nine messages of two symbols."
    with seeded_init(0): channel = Recurrent(Reinforce(3), 2, hidden=4, embedding=3, cell="gru")
    u, cost = torch.randn(1, 4, generator=generator(0)), torch.tensor([[1., 2, 5], [0, 3, 1], [4, 4, 0]])

    def log_p(s1, s2):
        weight, bias, first = channel.speaker.fold(channel.first)
        state = channel.speaker.step(first.expand(1, -1), channel.speaker.start(u))
        p1 = channel.speak(state[0]).log_softmax(-1)[0, s1]
        state = channel.speaker.step(F.linear(F.one_hot(torch.tensor([s1]), 3).float(), weight, bias), state)
        return p1 + channel.speak(state[0]).log_softmax(-1)[0, s2]

    expected = sum(log_p(a, b).exp() * cost[a, b] for a in range(3) for b in range(3))
    exact = torch.autograd.grad(expected, channel.speak.weight)[0]
    n = 200_000
    sent = channel.send(u.expand(n, -1), channel.draw_noise(n, generator(1)))
    losses = cost[sent.symbols[:, 0, 0], sent.symbols[:, 1, 0]]
    estimate = torch.autograd.grad(score_function_loss(losses, sent.log_prob), channel.speak.weight)[0]
    assert losses.mean().item() == pytest.approx(expected.item(), abs=.02)
    torch.testing.assert_close(estimate, exact, atol=.02, rtol=.05)
    assert exact.abs().max() > .1


@pytest.mark.parametrize("bottleneck", BOTTLENECKS)
def test_stacked_seeds_are_the_seeds_one_by_one(bottleneck):
    specs = [tiny(seed=s, bottleneck=bottleneck, epochs=3) for s in (0, 1)]
    together = sms.run(specs, QUIET)
    for s, r in zip(specs, together):
        alone, = sms.run([s], QUIET)
        torch.testing.assert_close(torch.tensor(r.history.loss.tolist()), torch.tensor(alone.history.loss.tolist()),
            rtol=1e-4, atol=1e-4)
    assert max(abs(a - b) for a, b in zip(together[0].history.loss,
        together[1].history.loss)) > 1e-3, "seeds differ by more than the tolerance"


def test_games_do_not_depend_on_length_bottleneck_or_seed():
    a, b = (sms.make_task(tiny(**c)).values["train"]
        for c in (dict(message_length=1), dict(message_length=3, bottleneck="reinforce", seed=5)))
    assert torch.equal(a, b) and not torch.equal(a, sms.make_task(tiny(games_seed=1)).values["train"])


def test_valued_candidates_score_as_one_hot_vectors_do():
    values = torch.randint(5, (8, 30, 7), generator=generator(0), dtype=torch.uint8)
    with seeded_init(0): receiver = LinearEncoder(35, 6)
    z = torch.randn(8, 6, generator=generator(1))
    plain = (receiver(F.one_hot(values.long(), 5).flatten(-2).float()) @ z[..., None]).squeeze(-1)
    ours = Valued(values, 5).scores(receiver, z)
    torch.testing.assert_close(ours.log_softmax(-1), plain.log_softmax(-1), atol=1e-5, rtol=1e-5)


def test_pictures_are_played_with():
    s = dataclasses.replace(grids.grid("pictures", "smoke", 1)[0], n_train=100, epochs=1)
    r, = sms.run([s], QUIET)
    assert 0 <= r.rows[0]["accuracy"] <= 1 and r.tensors["messages"].shape == (s.n_valid, s.message_length)


def test_symbols_that_say_nothing_are_not_counted():
    g = generator(0)
    meant = torch.randint(4, (4000, 2), generator=g)
    said = torch.stack([meant[:, 0], torch.randint(4, (4000,), generator=g), meant[:, 1]], 1)
    bits = information(said, meant).sum(1)
    assert bits.tolist() == pytest.approx([2, 0, 2], abs=.03) and effective_number(bits).item() == pytest.approx(2,
        abs=.05)
    words = F.one_hot(said, 4).float()
    order = torch.randperm(4000, generator=g)
    lost = [1 - (exchange(words, i, order).argmax(-1)[:, [0, 2]] == meant).all(1).float().mean() for i in range(3)]
    assert lost[1] == 0 and effective_number(torch.stack(lost)).item() == pytest.approx(2, abs=.01)


@pytest.mark.parametrize("fields, says", [
    (dict(min_symbols=0), "min_symbols must be at least 1, got 0"),
    (dict(bottleneck="gumble"), "did you mean 'gumbel'"), (dict(sampler="tiltd"), "did you mean 'tilted'"),
    (dict(alphabet_size=1), "alphabet_size must be at least 2"), (dict(hiden=3), "did you mean 'hidden'"),
    (dict(picture_size=32), "pictures do not fit in memory"),
])
def test_bad_specs_are_named(fields, says):
    with pytest.raises(ConfigError, match=says): sms.SMSSpec(**fields)


@pytest.mark.parametrize("changes, says", [
    (dict(min_symbols=9), "no game of 6 attributes and 9 distractors has min"),
    (dict(cell="grru"), "did you mean 'gru'"), (dict(temperature=0.), "temperature must be above 0"),
    (dict(optimizer="schedulfree"), "did you mean 'schedulefree'"),
])
def test_what_only_running_can_tell_is_named_too(changes, says):
    with pytest.raises(ConfigError, match=says): sms.run([tiny(**changes)], QUIET)
