"Several GPUs: who gets which, what a queue is asked for, and that nobody trains on a processor who was promised a GPU."
import pytest
import torch

from refcomm.core import ConfigError, say_once
from refcomm.runs import execute as module
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
    with pytest.raises(ConfigError, match="no GPU has a tenth of its memory free .*cuda:3 0%.*name one"): cards_of("auto")


def test_no_gpu_no_cards():
    assert torch.cuda.is_available() or cards_of("auto") == []


class Pool(LocalExecutor):
    asked = []

    def __init__(self, *args): self.asked.append(args)
    def submit(self, fn, *args): raise ConfigError(f"device {args[2]}")
    def shutdown(self, *a, **k): pass


@pytest.mark.parametrize("jobs, device, asked, given", [(None, "auto", (3, [0, 1, 3]), "cuda"), (2, "auto", (2, [0, 1, 3]),
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
    for _ in range(4): executors._start_worker(threads, None, value, (0, 1, 3))
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
