"The comparison of all bottlenecks, channels and games: devices, stacks, tasks."
import dataclasses

import pytest
import torch

from pretend_gpu import PretendGPU
from refcomm.core import generator
from refcomm.papers.beyond.run import SIZES, build, grid, make_task, run
from refcomm.papers.beyond.spec import BOTTLENECKS, GAMES, BeyondSpec
from refcomm.runs.execute import Context, make_stacks

TINY = dict(SIZES["smoke"], n_train=8, n_valid=8, n_test=8, batch_size=8)


@pytest.mark.parametrize("how", [dict(generations=2), {}, dict(game="reconstruction", generations=2),
    dict(bottleneck="fsq")], ids=str)
def test_trained_on_the_device_that_is_asked_for(how):
    "Weights and messages are back on the CPU; nothing is computed over two devices."
    s = BeyondSpec(**TINY | dict(bottleneck="straight-through", channel="recurrent") | how)
    with PretendGPU() as gpu:
        found, = run([s], Context("cuda"))
        assert len(gpu.steps) == s.generations * s.epochs and gpu.kernels
        assert not any(t.is_cuda for t in (*found.tensors.values(), *found.weights.values()))
    assert found.rows[-1]["n_targets"] == 8
    test, = run([s], Context("cpu"))
    assert found.rows[-1]["accuracy"] == test.rows[-1]["accuracy"]


def test_generations_tell_logs_and_checkpoints(tmp_path):
    from refcomm.training.loop import Checkpoint
    rows, shares = [], []
    s = BeyondSpec(**TINY, generations=3, bottleneck="straight-through")
    result, = run([s], Context("cpu", Checkpoint(tmp_path/"t.safetensors", "owner"),
        lambda done, text: shares.append(done), 0., rows.extend))
    assert [r["epoch"] for r in rows] == [0, 1, 2] == result.history.epoch.tolist() and shares[-1] == 1
    assert sorted(p.name for p in tmp_path.glob("*.safetensors")) == [f"t-{i}.safetensors" for i in range(3)]


def test_seeds_are_stacked_but_for_codebooks():
    specs = [BeyondSpec(**TINY, bottleneck=b, seed=seed) for b in BOTTLENECKS for seed in range(3)]
    assert [len(s) for s in make_stacks(specs, "cpu")] == [1 if s[0].bottleneck == "vq" else 3
        for s in make_stacks(specs, "cpu")]
    stacked = run([s for s in specs if s.bottleneck == "fsq"], Context("cpu"))
    alone, = run([next(s for s in specs if s.bottleneck == "fsq" and s.seed == 2)], Context("cpu"))
    assert [r.summary["trained_together"] for r in stacked] == [3]*3 and stacked[2].rows == alone.rows
    for k, v in alone.weights.items(): torch.testing.assert_close(stacked[2].weights[k], v)


@pytest.mark.parametrize("s", [BeyondSpec(**TINY, game=g, bottleneck=b, channel=c)
    for g, b, c in (("objects", "quantized", "instant"),
    ("discrimination", "vq", "instant"), ("images", "learned", "recurrent"),
    ("reconstruction", "reinforce", "ending"))], ids=lambda s: s.game)
def test_first_weights_come_from_the_seed_alone(s):
    "Not from what the process has drawn before."
    task, found = make_task(s), []
    for state in (1, 2):
        torch.manual_seed(state)
        found.append(build(s, task).state_dict())
    for k, v in found[0].items(): torch.testing.assert_close(found[1][k], v, rtol=0, atol=0, msg=k)


@pytest.mark.parametrize("game", GAMES)
def test_training_games_come_from_a_members_own_generator(game):
    "A run plays the same games alone and in a stack."
    task = make_task(BeyondSpec(**SIZES["smoke"], game=game))
    batch = lambda seeds: task.batch(torch.arange(8).expand(len(seeds), 8), [generator(s, "noise") for s in seeds])
    both, one = batch((0, 1)), batch((1,))
    seen = lambda games, m: games.x[m] if isinstance(games.x, torch.Tensor) else (games.x.items[m], games.x.index[m])
    torch.testing.assert_close(seen(both, 1), seen(one, 0), rtol=0, atol=0)


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_a_plan_knows_what_the_runs_cost(profile):
    "Counts of all runs are shipped; generations are trained one after the other."
    from refcomm.papers.counts import Model, _shipped, shape_of
    from refcomm.runs.costs import SPEEDS
    specs = [*grid("answer", profile, 1), *grid("iterated", profile, 1)]
    assert not [s for s in specs if shape_of(s) not in _shipped()]
    model, several = Model(specs, SPEEDS["H200"]), specs[-1]
    assert several.generations == 8
    assert all(model(s).seconds > 0 and model(s).bytes > 2**13 for s in specs[::25])
    assert model(several).seconds == pytest.approx(8*model(dataclasses.replace(several, generations=1)).seconds)
