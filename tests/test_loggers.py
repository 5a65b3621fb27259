"What each logger wrote, read back by its own package; and that nobody is disturbed by it."
import dataclasses
import importlib.util
import json
import os
import struct
import sys
from concurrent.futures import ThreadPoolExecutor

import pandas as pd
import pytest
import torch

from refcomm import cli
from refcomm.core import ConfigError
from refcomm.papers.eqc.run import EQCSpec
from refcomm.papers.patch import items as patch
from refcomm.papers.sms import items as sms
from refcomm.papers.eqc.items import SMALL
from refcomm.training.loggers import LOGGERS, MEASURED, CSVLog
from refcomm.runs.execute import execute, run_stack
from refcomm.runs.store import Store
from refcomm.training.loop import train_epoch

SPECS = [EQCSpec(seed=s, lr=1e-3, **{**SMALL["object"], "epochs": 4}) for s in (0, 1)] # one stack
names = pytest.mark.parametrize("name",
    [pytest.param(n, marks=pytest.mark.skipif(n != "csv" and importlib.util.find_spec(n) is None, reason=f"needs {n}"))
    for n in LOGGERS])


def read_csv(folder):
    t = pd.read_csv(folder/"metrics.csv")
    return ({n: t[["step", n]].dropna().values.tolist() for n in t if n != "step"},
        json.loads((folder/"spec.json").read_text()))


def read_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
    events = EventAccumulator(str(folder)).Reload()
    about = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    started = HParamsPluginData.FromString(about).session_start_info.hparams
    return ({n: [[e.step, e.value] for e in events.Scalars(n)] for n in events.Tags()["scalars"]},
        {k: getattr(v, v.WhichOneof("kind")) for k, v in started.items()})


def leveldb_log(data, block=32_768):
    "The records of a file in LevelDB's log format, as wandb writes it after 7 bytes of its own."
    at, record = 7, b""
    while at + 7 <= len(data):
        if block - at % block < 7: at += block - at % block; continue
        length, kind = struct.unpack("<HB", data[at + 4:at + 7]) # kind: 1 whole, 2 begins, 3 goes on, 4 ends
        record += data[at + 7:at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def read_wandb(folder):
    from wandb.proto.wandb_internal_pb2 import Record
    file, = folder.glob("wandb/offline-run-*/run-*.wandb")
    found, fields, ended = {}, {}, []
    for record in map(Record.FromString, leveldb_log(file.read_bytes())):
        row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for n in row.keys() - {"epoch"}: found.setdefault(n, []).append([row["epoch"], row[n]])
        fields |= {u.key: json.loads(u.value_json) for u in record.run.config.update}
        if record.HasField("exit"): ended.append(record.exit.exit_code)
    assert ended == [0]
    return found, fields


def read_mlflow(folder):
    from mlflow import MlflowClient
    client = MlflowClient(f"sqlite:///{folder.parents[1]}/mlflow.db")
    run, = client.search_runs([client.get_experiment_by_name(folder.parent.name).experiment_id],
        f"attributes.run_name = '{folder.name}'")
    assert run.info.status == "FINISHED"
    return ({n: [[m.step, m.value] for m in client.get_metric_history(run.info.run_id, n)] for n in run.data.metrics},
        run.data.params)


READ = dict(csv=read_csv, tensorboard=read_tensorboard, wandb=read_wandb, mlflow=read_mlflow)


def check(name, home, record):
    "The log of a run holds its record's epochs, once each, its Spec and its final numbers."
    found, fields = READ[name](home/"logs"/name/record.experiment/record.key)
    history = record.history()
    for n in MEASURED:
        assert [s for s, _ in found[n]] == history.epoch.tolist(), (name, n)
        assert [v for _, v in found[n]] == pytest.approx(history[n].tolist(), rel=1e-5)
    assert float(fields["lr"]) == record.spec["lr"] and int(fields["seed"]) == record.spec["seed"]
    for n, v in record.summary.items():
        if isinstance(v, (int, float)): assert found[f"summary/{n}"] == [[len(history) - 1, pytest.approx(v)]]
    return found


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    "The same runs without a logger."
    return execute(SPECS, store=Store(tmp_path_factory.mktemp("calm")))


class PowerCut(Exception): pass


@names
def test_a_stack_killed_and_resumed_logs_each_run_whole(home, monkeypatch, calm, name):
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("REFCOMM_LOGGER", "csv") # the argument counts
    done = []
    def cut(t, *a):
        if len(done) == 3: raise PowerCut
        train_epoch(t, *a); done.append(t.epoch)
        if len(done) == 2: a[2]() # the last checkpoint; one more epoch is logged after it
    monkeypatch.setattr("refcomm.training.loop.train_epoch", cut)
    with pytest.raises(PowerCut): execute(SPECS, logger=name)
    monkeypatch.setattr("refcomm.training.loop.train_epoch", train_epoch)
    records = execute(SPECS, logger=name)
    assert done == [0, 1, 2] and not list(home.glob("logs/csv" if name != "csv" else "logs/wandb"))
    for record, known in zip(records, calm):
        found = check(name, home, record)
        assert (record.rows == known.rows
            and record.history().drop(columns="seconds").equals(known.history().drop(columns="seconds")))
        assert all(torch.equal(v, known.tensors()[k]) for k, v in record.tensors().items())
        assert [v for _, v in found["rows/accuracy"]] == pytest.approx([r["accuracy"] for r in record.rows])
    before = sorted((p, p.stat().st_mtime) for p in home.glob("logs/*/eqc/*/*"))
    execute(SPECS, logger=name)
    assert before == sorted((p, p.stat().st_mtime)
        for p in home.glob("logs/*/eqc/*/*")), "what is found is not logged again"


@pytest.mark.parametrize("spec", [patch.configure("smoke", model="supervised", trained=False),
    sms.grid("epoch30", "smoke", 1)[0]],
    ids=["untrained", "sms"])
def test_other_experiments_log(home, monkeypatch, spec):
    "Those that several processes train are in test_distributed."
    monkeypatch.setenv("REFCOMM_LOGGER", "csv")
    record, = execute([spec])
    found = read_csv(home/"logs"/"csv"/record.experiment/record.key)[0]
    if getattr(spec, "trained", True):
        assert found["loss"] == record.history()[["epoch", "loss"]].values.tolist()
    assert found["summary/n_parameters"][0][1] == record.summary["n_parameters"] and any(n.startswith("rows/")
        for n in found)


@pytest.mark.slow
def test_workers_and_kernels_hear_of_it(home, monkeypatch):
    from typer.testing import CliRunner
    monkeypatch.setenv("REFCOMM_LOGGER", "")
    loggers = []
    monkeypatch.setattr(cli, "reproduce_item", lambda item, path, *a: loggers.append(os.environ["REFCOMM_LOGGER"])
        or ("done", path, ""))
    assert CliRunner().invoke(cli.app,
        ["reproduce", "eqc/table1", "--profile", "smoke", "--logger", "csv"]).exit_code == 0
    assert loggers == ["csv"]
    with ThreadPoolExecutor(1) as pool:
        records = execute([dataclasses.replace(SPECS[0], word_length=w, epochs=1) for w in (10, 20)], executor=pool)
    for r in records: check("csv", home, r)


@pytest.mark.parametrize("name, says",
    [("wandbb", "unknown logger 'wandbb': did you mean 'wandb'"),
    ("mlflow", r"needs the package mlflow: pip install 'refcomm\[mlflow\]'")])
def test_what_cannot_be_logged_with_is_named_first(home, monkeypatch, name, says):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ConfigError, match=says): execute(SPECS, logger=name)
    with pytest.raises(ConfigError, match=says): run_stack(SPECS, Store().root, logger=name)
    with pytest.raises(ConfigError, match=says):
        cli.reproduce(["eqc/table1"], profile="smoke", jobs=1, executor=None, logger=name, weights=None, parameters=[],
            quick=False, into=None, force=False, dry_run=False)
    assert not home.exists(), "nothing was begun"


@pytest.mark.parametrize("when", [0, 2], ids=["at the start", "in the middle"])
def test_a_log_that_fails_is_one_warning(home, monkeypatch, calm, when):
    real, written = CSVLog.log_metrics, []
    def full(self, metrics, step):
        if len(written) == when: raise OSError("No space left on device")
        written.append(step); real(self, metrics, step)
    monkeypatch.setattr(CSVLog, "log_metrics", full)
    with pytest.warns(UserWarning,
        match="logger 'csv' failed, and nothing more is logged of these runs: OSError: No space") as caught:
        records = execute(SPECS, logger="csv")
    assert len(caught) == 1 and [r.rows for r in records] == [r.rows for r in calm]


def test_a_folder_that_cannot_be_written(home, calm):
    home.mkdir(); (home/"logs").write_text("")
    with pytest.warns(UserWarning, match="logger 'csv' failed"): records = execute(SPECS, logger="csv")
    assert [r.rows for r in records] == [r.rows for r in calm]
