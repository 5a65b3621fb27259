"Two processes train what one trains, and write one record."
import dataclasses
import os
import subprocess
import sys

import pandas as pd
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from conftest import free_port
from refcomm.core import ConfigError, generator, seeded_init
from refcomm.distributed import agree, any_process, join_processes, sum_over_processes
from refcomm.training.ensemble import Ensemble
from refcomm.papers.patch.run import settings_of
from refcomm.papers.iac import items as iac
from refcomm.papers.patch import items as patch
from refcomm.runs.execute import execute, write_plan
from refcomm.runs.store import Store
from refcomm.training.loop import TrainSettings, fit

X = torch.randn(44, 5, generator=generator(0, "x"))


def trained(checkpoint=None, **changes):
    "A linear map, eleven batches of four, two to a step: the last step has one batch, or none."
    with seeded_init(0): e = Ensemble([torch.nn.Linear(5, 3)])
    settings = TrainSettings(**dict(epochs=2, batch_size=4, lr=.05, accumulate=2) | changes)
    def loss(i, generators): return e.map(lambda m, x: F.cross_entropy(m(x), x[:, :3].argmax(-1)), X[i])
    def validate():
        return {k: e.map(lambda m: F.cross_entropy(m(X), X[:, :3].argmax(-1))) for k in ("accuracy", "loss")}
    fitted = fit(e, loss, validate, 40, settings, [0], checkpoint=checkpoint, report=lambda *_: None)
    return fitted.history.loss.tolist(), [p.detach().clone() for p in e.parameters()]


class Cut(Exception): pass


def noisy(checkpoint=None, steps=10**6):
    "Each process draws noise of its own; after so many batches the power goes."
    with seeded_init(0): e = Ensemble([torch.nn.Linear(5, 3)])
    left = iter(range(steps))
    def loss(i, generators):
        if next(left, None) is None: raise Cut
        return e.map(lambda m, x, n: F.cross_entropy(m(x + n), x[:, :3].argmax(-1)), X[i],
            torch.randn(1, i.shape[1], 5, generator=generators[0]))
    def validate():
        return {k: e.map(lambda m: F.cross_entropy(m(X), X[:, :3].argmax(-1))) for k in ("accuracy", "loss")}
    fitted = fit(e, loss, validate, 40, TrainSettings(epochs=3, batch_size=4, lr=.05, accumulate=2), [0],
        checkpoint=checkpoint, checkpoint_seconds=0, report=lambda *_: None)
    return fitted.history.drop(columns="seconds"), [p.detach().clone() for p in e.parameters()]


def one_of_two(rank, port, folder):
    os.environ |= {k: str(v) for k, v in dict(RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1",
        MASTER_PORT=port).items()}
    torch.set_num_threads(1)
    expected = trained()
    join_processes(2)
    got = trained(os.path.join(folder, "training.safetensors"))
    assert got[0] == pytest.approx(expected[0], rel=1e-5)
    for a, b in zip(expected[1], got[1]): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert trained(os.path.join(folder, "training.safetensors"))[0] == got[0], "resumed at its end"
    with pytest.raises(ConfigError, match="2 processes cannot share the 3 batches of a step"): trained(accumulate=3)
    whole = noisy()
    with pytest.raises(Cut): noisy(os.path.join(folder, "noisy.safetensors"), 8)
    again = noisy(os.path.join(folder, "noisy.safetensors"))
    assert again[0].equals(whole[0]) and all(torch.equal(a, b)
        for a, b in zip(again[1], whole[1])), "each goes on with its own noise"
    assert agree([rank == 0, True, False]) == [True, True, False] and any_process([rank == 1, False]) == [True, False]
    x = torch.full((2,), rank + 1.)
    sum_over_processes(x)
    assert x.tolist() == [3, 3]
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_what_one_trains(tmp_path):
    mp.spawn(one_of_two, (free_port(), str(tmp_path)), nprocs=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["noisy.safetensors", "training.safetensors"]


@pytest.mark.slow
def test_torchrun_makes_one_record_of_each_run(home, tmp_path):
    """Noise differs between processes, the games do not: the loss of a patch game among the 16 images of one process
    would be a fifth lower. Two processes leave out an odd last batch, so that rates agree by epochs only."""
    specs = [dataclasses.replace(iac.grid("figure3", "smoke", 1)[0], accumulate=2, augmentations=False,
        lr_per_epoch=True),
        patch.grid("figure9", "smoke", 1)[0]]
    write_plan(specs, tmp_path/"plan.json")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}",
        "--no-python", sys.executable, "-c",
               "import sys; from refcomm.cli import main; sys.argv[0] = 'refcomm'; main()", "runs", "execute",
               str(tmp_path/"plan.json"), "--device", "cpu", "--logger", "csv"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr
    assert (done.stdout.count("2 runs are in the store") == 1 and len(Store().keys()) == 2
        and not list(Store().root.glob("unfinished/*")))
    for record, alone in zip(execute(specs), execute(specs, store=Store(tmp_path/"alone"), device="cpu")):
        ours, known = record.history(), alone.history()
        assert ours[["epoch", "lr"]].equals(known[["epoch",
            "lr"]]) and ours.loss.tolist() == pytest.approx(known.loss.tolist(), rel=.1)
        played = [[(r.get("data"), r.get("augmented"), r["n_candidates"]) for r in each.rows if r["kind"] == "play"]
            for each in (record, alone)]
        assert played[0] == played[1] != []
        logged = pd.read_csv(home/"logs"/"csv"/record.experiment/record.key/"metrics.csv")
        assert logged.loss.dropna().tolist() == ours.loss.tolist(), "the first process logs"


def test_a_batch_of_images_is_split_evenly(monkeypatch):
    monkeypatch.setattr("refcomm.papers.patch.run.processes", lambda: (0, 3))
    with pytest.raises(ConfigError, match="3 processes cannot share batches of 32: make batch_size a multiple of 3"):
        settings_of(patch.configure("smoke"))
