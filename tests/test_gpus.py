"Several GPUs: who gets which, what a queue is asked for, and that nobody trains on a processor who was promised a GPU."
import json
import os
import re
from pathlib import Path

import pytest
import torch

from refcomm.core import ConfigError, say_once
from refcomm.papers import counts
from refcomm.runs import costs, execute as module
from refcomm.runs.experiments import spec_class
from refcomm.runs.store import Store
from refcomm.runs.executors import LocalExecutor, SlurmExecutor, asked_gpus, cards_of


@pytest.fixture
def four(monkeypatch):
    "Four GPUs, of which the third is full."
    free = [.9, .5, .01, .2]
    for name, value in dict(is_available=lambda: True, device_count=lambda: 4, current_device=lambda: 0,
        mem_get_info=lambda i: (free[i]*2**35, 2**35)).items(): monkeypatch.setattr(torch.cuda, name, value)
    say_once.cache_clear()
    return free


def test_gpus_are_dealt(four, capsys):
    assert cards_of("auto") == cards_of("cuda") == [0, 1, 3] and cards_of("cuda:2") == [2] and cards_of("cpu") == []
    assert capsys.readouterr().err == "refcomm: cuda:2 is left to others, as 1% of its memory is free\n"
    four[:] = [0.]*4
    with pytest.raises(ConfigError, match="no GPU has a tenth of its memory free .*cuda:3 0%.*name one"):
        cards_of("auto")


def test_no_gpu_no_cards():
    assert torch.cuda.is_available() or cards_of("auto") == []


class Pool(LocalExecutor):
    asked = []

    def __init__(self, *args): self.asked.append(args)
    def submit(self, fn, *args): raise ConfigError(f"device {args[2]}")
    def shutdown(self, *a, **k): pass


@pytest.mark.parametrize("jobs, device, asked, given",
    [(None, "auto", (3, [0, 1, 3]), "cuda"), (2, "auto", (2, [0, 1, 3]),
    "cuda"), (None, "cuda", (3, [0, 1, 3]), "cuda"), (2, "cuda:1", (2, [1]), "cuda:1"), (2, "cpu", (2, []), "cpu")])
def test_one_worker_a_gpu(four, home, small, monkeypatch, jobs, device, asked, given):
    "`jobs=None` makes one worker for each; `auto` is `cuda` for them, so that a worker that finds none fails."
    monkeypatch.setitem(module.EXECUTORS, "local", Pool)
    Pool.asked.clear()
    with pytest.raises(ConfigError, match=f"^device {given}$"):
        module.execute([small(hidden=h, channel="recurrent", epochs=1) for h in (8, 9, 10, 11)], jobs, device)
    assert Pool.asked == [asked]



def test_workers_take_their_gpus_in_turn(monkeypatch):
    import multiprocessing
    from refcomm.runs import executors
    taken = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(executors.threading, "Thread", lambda **k: type("T", (), dict(start=lambda self: None))())
    monkeypatch.setattr(executors.signal, "signal", lambda *a: None)
    threads, value = torch.get_num_threads(), multiprocessing.get_context("spawn").Value("i", 0)
    for _ in range(4): executors._start_worker(threads, None, value, (0, 1, 3), dict(os.environ))
    assert taken == [0, 1, 3, 0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_promised_gpu_that_is_not_there(home, small):
    with pytest.raises(ConfigError, match="'cuda' asked for, but PyTorch sees no GPU"):
        module.run_stack([small(epochs=1)], home, "cuda")


def test_slurm_asks_for_a_gpu(home, monkeypatch):
    submitit = pytest.importorskip("submitit")
    asked = []

    class Queue:
        cluster = "slurm"
        def __init__(self, folder): pass
        def update_parameters(self, **parameters): asked.append(parameters.get("gpus_per_node"))
    monkeypatch.setattr(submitit, "AutoExecutor", Queue)
    for device in ("cuda", "cpu", "cuda:0"): SlurmExecutor(1, device).shutdown()
    assert asked == [1, None, 1] and asked_gpus("cpu") == 0
    with pytest.raises(ConfigError, match="use device='cuda', which asks for a GPU a job"): SlurmExecutor(1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_stacks_of_another_machine(small):
    specs = [small(bottleneck="quantized", alphabet_size=v) for v in (2, 3)]
    assert [len(module.make_stacks(specs, torch.device(d))) for d in ("cuda", "cpu")] == [1, 2]
    with pytest.raises(ConfigError, match="sees no GPU"): module.make_stacks(specs, "cuda")


@pytest.fixture
def apple(monkeypatch):
    "A machine that says it has Apple's GPU; `mps` is the processor under another name, or broken by `how`."
    from refcomm import core

    def pretend(how):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
        monkeypatch.setattr(core, "device_fault", how)
        core._mps_computes.cache_clear()
    yield pretend
    core._mps_computes.cache_clear()


def test_auto_takes_apples_gpu_only_where_it_computes(apple, recwarn):
    from refcomm.core import device_fault, pick_device
    tried = []
    apple(lambda device: tried.append(device) or "")
    assert pick_device("auto") == pick_device("auto") == torch.device("mps") and tried == ["mps"] and not recwarn.list
    apple(lambda device: device_fault("meta"))
    assert [pick_device("auto").type for _ in range(3)] == ["cpu"]*3 and pick_device("mps").type == "mps"
    said, = recwarn.list
    assert "'auto' leaves Apple's GPU (mps) unused and takes the CPU: " in str(said.message)
    apple(lambda device: "its numbers differ from the CPU's by 0.5")
    with pytest.warns(UserWarning, match="differ from the CPU's by 0.5"): assert pick_device("auto").type == "cpu"


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="it works here")
def test_what_fails_on_apples_gpu_is_named(apple):
    from refcomm.core import device_fault, pick_device
    apple(device_fault)
    with pytest.warns(UserWarning, match="takes the CPU: .*(MPS|mps)"): assert pick_device("auto").type == "cpu"


@pytest.mark.parametrize("able, taken", [((9, 0), "bf16"), ((7, 5), "fp16"), ((6, 1), "fp32")])
def test_gpus_without_bf16_train_in_what_they_have(home, small, monkeypatch, capsys, able, taken):
    from pretend_gpu import PretendGPU
    from refcomm.training import loop
    spec = small(epochs=1, precision="bf16", n_train=64, hidden=8, word_length=4, candidates=(2,))
    used = set()
    autocast = loop.autocast
    monkeypatch.setattr(loop, "autocast", lambda precision, device: used.add(precision) or autocast(precision, device))
    say_once.cache_clear()
    with PretendGPU():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a: able)
        module.run_stack([spec], home/"runs", "cuda")
    record = Store(home/"runs").get(spec)
    assert used == {taken} and record.spec["precision"] == "bf16"
    other = f"{taken} in place of bf16"
    assert (other in record.provenance["device"]) == (taken != "bf16")
    said = f"refcomm: cuda:0 does not compute in bf16: trainings use {taken} in its place\n"
    assert capsys.readouterr().err.count(said) == (taken != "bf16")


def test_a_notebook_suits_its_device(monkeypatch):
    from refcomm.core import check_injected
    from pretend_gpu import PretendGPU
    names = dict(profile="auto", device="auto")
    with PretendGPU(): check_injected(names)
    assert names["profile"] == "gpu"
    named = dict(profile="cpu", device="cpu")
    check_injected(named)
    assert named["profile"] == "cpu"


@pytest.mark.parametrize("profile", ["smoke", "cpu", "gpu"])
def test_a_plan_counts_nothing_anew(profile, capfd):
    "What every item trains, with real data and with embedded ones, is in the shipped counts."
    import count_gpu
    from refcomm.papers.counts import _shipped, shape_of, trains
    specs = [s for s in count_gpu.every(profile) if trains(s)]
    assert len(specs) > 100
    missing = {shape: s for s in specs if (shape := shape_of(s, count_gpu.COUNTED[profile])) not in _shipped()}
    assert not missing, f"{len(missing)} shapes, first {[*missing.values()][0]}: python tests/count_gpu.py {profile}"


def test_the_page_on_gpus_has_every_item():
    from conftest import ROOT
    from refcomm.publish.catalogue import item_runs, notebooks, parameters_of
    shown = re.findall(r"^\| (\w+/\w+) \|", (ROOT/"nbs"/"gpu.md").read_text(encoding="utf-8"), re.M)
    assert shown == [item for item, path in notebooks().items()
        if item_runs(item, {**parameters_of(path), "profile": "gpu"})]


def test_estimates_are_within_a_factor_of_two_of_measured_steps():
    """Of items, at `cpu`: seconds of their trainings by steps that were timed (`tests/on_gpu.py --device cpu`), and by what
    they compute and the speed of that machine, measured before. Four of five items are within a factor of two."""
    measured = json.loads((Path(__file__).parent/"reference"/"steps_cpu.json").read_text(encoding="utf-8"))
    speed, ratios = costs.Speed(**measured["speed"]), {}
    for item, trainings in measured["items"].items():
        estimated = timed = 0
        for number, runs in trainings:
            t = measured["steps"][number]
            fields = {k: tuple(v) if isinstance(v, list) else v for k, v in t["fields"].items()}
            s = spec_class(t["experiment"])(**fields)
            half = getattr(s, "precision", "fp32") != "fp32"
            weight = runs*s.epochs*counts.training_items(s)[0]/s.batch_size
            estimated += weight*costs.run_seconds(counts.counted(s), speed, 1, 1, 0, half, t["together"])
            timed += weight*t["seconds"]/t["together"]
        ratios[item] = estimated/timed
    far = {item: round(r, 2) for item, r in ratios.items() if not .5 <= r <= 2}
    assert len(ratios) >= 40 and len(far) <= .2*len(ratios), far
