"Every experiment, model and precision on a pretended GPU: nothing mixes devices, and a training step waits for the device no more often than is said here."
import pytest
import torch
from device_specs import JUDGES, all_specs, eqc_spec, experiment, patch_spec, tiny_distilbert
from pretend_gpu import PretendGPU

from refcomm.core import generator, pick_device, same_device
from refcomm.data.scenes import SceneWorld
from refcomm.data.shapes import ShapeWorld
from refcomm.papers.eqc import run as eqc
from refcomm.runs.execute import Context, make_stacks

WAITS = {  # beginning of a name → most synchronisations in a usual training step
    "eqc": 0, "iac": 0, "patch": 0, "sms": 0,
    "eqc object instant vq": 1, "eqc object recurrent vq": 2,  # vector-quantize-pytorch asks whether its codebook has begun
    "eqc sent-cls fine-tuned": 2,  # transformers asks, for either agent, whether any sentence is padded
    "patch VQ-VAE2": 2, "patch MoCo": 1, "patch ViT": 1,  # as VQ; lightly reads the place in its queue; the number of patches is a shape
    "sms gumbel fp16": 1, "sms reinforce fp16": 1,  # the scaler asks whether gradients were finite before a step of schedulefree
}
NAMES = [*all_specs("no encoder")]


def most_waits(name): return WAITS[max((start for start in WAITS if name.startswith(start)), key=len)]


@pytest.fixture(scope="session")
def encoder(tmp_path_factory): return tiny_distilbert(tmp_path_factory.mktemp("distilbert"))


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def kept(tmp_path_factory): return str(tmp_path_factory.mktemp("home"))  # features of images are extracted once


def context(device="cuda", checkpoint=None, report=lambda *a: None, seconds=60.):
    return Context(device, checkpoint, report, seconds)


@pytest.mark.parametrize("name", NAMES)
def test_runs_on_a_gpu(name, kept, monkeypatch, encoder):
    monkeypatch.setenv("REFCOMM_HOME", kept)
    specs = all_specs(encoder)[name]
    with PretendGPU() as gpu: results = experiment(specs).run(specs, context())
    assert len(results) == len(specs) and all(r.rows for r in results)
    assert bool(gpu.steps) == (len(results[0].history.columns) > 1)  # what is not trained has seconds alone
    if gpu.steps: assert gpu.usual().syncs.total() <= most_waits(name), gpu.report()


@pytest.mark.parametrize("name", JUDGES)
def test_judges_run_on_a_gpu(name, home):
    here = JUDGES[name]("cpu")
    with PretendGPU(): there = JUDGES[name]("cuda")
    if isinstance(here, torch.Tensor): torch.testing.assert_close(there, here, atol=1e-3, rtol=0)
    elif name == "probes": assert there == pytest.approx(here, abs=.05)
    assert len(there) == len(here)


class Cut(Exception): pass


@pytest.mark.parametrize("first, then", [("cpu", "cuda"), ("cuda", "cpu"), ("cuda", "cuda")])
@pytest.mark.parametrize("spec", [lambda: eqc_spec("object", bottleneck="gumbel", alphabet_size=6, word_length=1,
    epochs=3), lambda: patch_spec(epochs=3)])
def test_a_checkpoint_is_continued_on_another_device(spec, first, then, tmp_path, home):
    s = spec()

    def cut(done, text):
        if .5 < done < 1: raise Cut
    path = tmp_path/"training.safetensors"
    with PretendGPU():
        with pytest.raises(Cut): experiment([s]).run([s], context(first, path, cut, 0.))
        assert path.exists()
        resumed, = experiment([s]).run([s], context(then, path))
        if first == then:
            whole, = experiment([s]).run([s], context(first))
            assert resumed.history.loss.tolist() == whole.history.loss.tolist() and resumed.rows == whole.rows
    assert len(resumed.history) == 3 and resumed.history.loss.iloc[-1] < 2*resumed.history.loss.iloc[0]


def test_devices_are_compared_by_what_they_are():
    with PretendGPU():
        assert pick_device("cuda") == pick_device("auto") == torch.device("cuda:0") == torch.zeros(1,
            device="cuda").device
        assert same_device(generator(0, device="cuda").device, pick_device("cuda")) and not same_device("cuda", "cpu")


def test_shapes_are_drawn_and_rendered_on_the_device():
    with PretendGPU():
        world = ShapeWorld(16, device="cuda")
        drawn = ([world.draw(5, generator(0, device="cuda"), distinct) for distinct in (True, False)]
            + [world.draw(5, generator(0))])
        assert all(d.is_cuda and world.render(d).is_cuda for d in drawn)


def test_many_scenes_are_painted_once(home, monkeypatch):
    monkeypatch.setattr("refcomm.data.scenes.MANY", 20*32**2)
    world = SceneWorld(32)
    first = world.draw(20, generator(0))
    monkeypatch.setattr(SceneWorld, "paint", lambda *a: pytest.fail("painted again"))
    again = SceneWorld(32).draw(20, generator(0))
    assert all(torch.equal(a, b) for a, b in zip(first,
        again)) and len([*(home/"cache"/"scenes").glob("*.safetensors")]) == 1
    with pytest.raises(pytest.fail.Exception, match="painted again"): world.draw(20, generator(1))


def test_alphabets_are_stacked_on_a_gpu_and_trained_as_if_alone(home):
    specs = [eqc_spec("object", bottleneck="quantized", alphabet_size=v, seed=seed) for v in (2, 3, 8)
        for seed in (0, 1)]
    assert len(make_stacks(specs, "cpu")) == 3
    with PretendGPU() as gpu:
        assert make_stacks(specs, "cuda") == [specs]
        assert len(make_stacks([eqc_spec("object", bottleneck="gumbel", alphabet_size=6, word_length=1, temperature=t)
            for t in (.5, 1.)], "cuda")) == 1
        together = eqc.run(specs, context())
    alone = [eqc.run([s], context("cpu"))[0] for s in specs]
    for a, b, s in zip(together, alone, specs):
        assert a.summary == b.summary and {r["alphabet"] for r in a.rows} == {s.alphabet_size}
        torch.testing.assert_close(torch.tensor(a.history.loss.to_numpy()), torch.tensor(b.history.loss.to_numpy()),
            atol=1e-4, rtol=0)
        assert all(abs(x["accuracy"] - y["accuracy"]) < .1 for x, y in zip(a.rows, b.rows))
    assert not gpu.usual().syncs


def test_temperatures_are_stacked(home):
    specs = [eqc_spec("object", bottleneck="gumbel", alphabet_size=6, word_length=1, temperature=t) for t in (.5, 2.)]
    together, alone = eqc.run(specs, context("cpu")), [eqc.run([s], context("cpu"))[0] for s in specs]
    for a, b in zip(together, alone):
        torch.testing.assert_close(torch.tensor(a.history.loss.to_numpy()), torch.tensor(b.history.loss.to_numpy()),
            atol=1e-5, rtol=0)
    assert together[0].history.loss.tolist() != together[1].history.loss.tolist()


def test_the_script_for_a_real_gpu_says_what_it_timed(home, tmp_path):
    import json

    import on_gpu
    with PretendGPU():
        failed = on_gpu.main(["--out", str(tmp_path/"gpu.json"), "--profile", "smoke", "--only", "sms/figure2",
            "--specs", "sms adam"])
    found = json.loads((tmp_path/"gpu.json").read_text())
    assert not failed and not found["failed"] and found["device"] == "Pretended GPU"
    assert [c["near"] for c in found["compared"]] == [True]
    assert all(t["experiment"] == "sms" and t["fields"]["hidden"] == 16 and t["runs"] == 3
        for t in found["timed"]["sms/figure2"])


def test_the_table_says_what_a_step_asks_of_a_gpu(home):
    import count_gpu
    head, rule, *rows = count_gpu.table("smoke", ["sms/figure2", "iac/figure3"])
    cells = [[c.strip() for c in row.strip("| ").split("|")] for row in rows]
    assert [c[0] for c in cells] == ["iac/figure3", "sms/figure2"] and all(int(c[1].split("–")[0]) > 50 for c in cells)
    assert [c[2] for c in cells] == ["0", "0"] and all(c[3].endswith("s") and c[4].endswith("iB") for c in cells)
