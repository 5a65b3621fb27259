"Every experiment, model and precision on a pretended GPU: nothing mixes devices, and a training step waits for the device no more often than is said here."
import pytest
import torch
from device_specs import all_specs, eqc_spec, experiment, patch_spec, tiny_distilbert
from pretend_gpu import PretendGPU

from refcomm.runs.execute import Context

WAITS = {  # beginning of a name → most synchronisations in a usual training step
    "eqc": 9, "iac": 228, "patch": 155, "sms": 2,
}
NAMES = [*all_specs("no encoder")]


def waits(name): return WAITS[max((start for start in WAITS if name.startswith(start)), key=len)]


def most_waits(name): return waits(name)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory): return tiny_distilbert(tmp_path_factory.mktemp("distilbert"))


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def context(device="cuda", checkpoint=None, report=lambda *a: None, seconds=60.): return Context(device, checkpoint, report, seconds)


@pytest.mark.parametrize("name", NAMES)
def test_runs_on_a_gpu(name, home, encoder):
    specs = all_specs(encoder)[name]
    with PretendGPU() as gpu: results = experiment(specs).run(specs, context())
    assert len(results) == len(specs) and all(r.rows for r in results)
    if name != "patch Random": assert gpu.usual().syncs.total() <= most_waits(name), gpu.report()


class Cut(Exception): pass


@pytest.mark.parametrize("first, then", [("cpu", "cuda"), ("cuda", "cpu"), ("cuda", "cuda")])
@pytest.mark.parametrize("spec", [lambda: eqc_spec("object", bottleneck="gumbel", alphabet_size=6, word_length=1, epochs=3), lambda: patch_spec(epochs=3)])
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
