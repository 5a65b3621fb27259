"What a new user stumbles over: values that no run can have, bars, plans with other people's times."
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from refcomm import cli
from refcomm.core import ConfigError, Interrupted
from refcomm.papers import counts
from refcomm.runs import costs, execute as module
from refcomm.runs.execute import execute


def test_impossible_values_are_refused_before_a_kernel_starts(home, monkeypatch):
    monkeypatch.setattr(cli, "reproduce_item", lambda *a: pytest.fail("a kernel was started"))
    for item, value, why in (("beyond/answer", "games=object", "did you mean 'objects'"),
        ("eqc/table5", "n_seeds=-1", "must be at least 1, got -1"),
        ("eqc/table5", "seeds=2", "did you mean 'n_seeds'")):
        for more in ([], ["--dry-run"]):
            found = CliRunner().invoke(cli.app, ["reproduce", item, "--profile", "smoke", "-p", value, *more])
            assert isinstance(found.exception, ConfigError) and why in str(found.exception)


def test_missing_data_are_no_impossible_value(home, monkeypatch):
    "They concern one item of many, whose notebook says so."
    from refcomm.publish import catalogue
    def grid(item, parameters): raise ConfigError("no data")
    monkeypatch.setattr(catalogue, "item_runs", grid)
    catalogue.check_values("eqc/table5", catalogue.notebooks()["eqc/table5"], dict(n_seeds=2))


def test_a_bar_shows_epochs_and_loss_within_the_first_run(home, small, monkeypatch):
    said, one = [], small(channel="recurrent", epochs=2)
    class Bar:
        n = 0
        def __init__(self, *a, **k): pass
        def __enter__(self): return self
        def __exit__(self, *a): pass
        def set_postfix_str(self, text, refresh=True): said.append(text)
        def update(self, n): pass
    monkeypatch.setattr(module, "progress_bar", Bar)
    execute([one])
    assert [t.split(", ")[0] for t in said[:2]] == ["epoch 1 of 2", "epoch 2 of 2"] and "loss " in said[0]


def test_a_bar_over_workers_shows_what_a_running_one_says(tmp_path):
    path = tmp_path/"0"
    assert module._progress_in(path) == (0., "")
    module._reporter(path)(.25, "epoch 1 of 4, loss 2.1")
    assert module._progress_in(path) == (.25, "epoch 1 of 4, loss 2.1")


def test_a_stopped_training_is_one_line_in_a_notebook():
    assert (Interrupted("stopped by SIGINT: 1 of 2 runs are kept")._render_traceback_() == ["Interrupted: stopped by "
        "SIGINT: 1 of 2 runs are kept"])


def test_a_plan_shows_disk_and_says_that_shipped_times_are_of_other_data(home, monkeypatch):
    monkeypatch.setattr(counts, "speed_of", lambda device: costs.SPEEDS["H200"]._replace(name="this", overlaps=False))
    monkeypatch.delenv("REFCOMM_DATA", raising=False)
    recipe = dict(costs.shipped()["iac/table1"])
    recipe["costs"] = {k: v for k, v in recipe["costs"].items() if k != "bytes"}
    said = {}
    for data in ("Tiny-ImageNet, 13,000 images", "rendered shapes"):
        monkeypatch.setattr(costs, "shipped", lambda: {"iac/table1": recipe | dict(data=data)})
        said[data] = " ".join(CliRunner().invoke(cli.app, ["plan", "iac/table1", "--profile", "cpu"]).output.split())
        assert "MiB" in said[data] and "?" not in said[data]
    other, same = said.values()
    assert ("iac/table1 (shipped with Tiny-ImageNet, 13,000 images; here rendered shapes)" in other
        and "as counted, for this" in other)
    assert "other data" not in same and "as shipped runs of this item" in same


SCRIPT = """
import itertools, os, pandas as pd, signal
from refcomm import load_objects, make_game, referential, train
signal.signal(signal.SIGINT, signal.default_int_handler) # a shell's background jobs ignore it
objects = load_objects(pd.DataFrame(itertools.product("abcd", "xyz", "1234"), columns=["letter", "end", "number"]))
task = referential(objects, distractors=4, valid=8, test=12)
def step(done, game):
    if done > .5: os.kill(os.getpid(), signal.SIGINT)
run = train(make_game(task, hidden=8), task, epochs=4, batch_size=8, on_step=step)
print(run.accuracy)
"""


@pytest.mark.slow
def test_a_script_that_is_stopped_says_in_one_line_what_is_kept(home, tmp_path):
    (tmp_path/"mine.py").write_text(SCRIPT)
    found = subprocess.run([sys.executable, tmp_path/"mine.py"], capture_output=True, text=True)
    said = [line for line in found.stderr.splitlines() if "it/s" not in line and line.strip()]
    assert found.returncode == 130 and not found.stdout and "Traceback" not in found.stderr
    assert said == [f"refcomm: stopped by SIGINT: 0 of 1 runs are in {home/'runs'}, and 1 unfinished training has a checkpoint there; "
        "the same command continues"]
