"Kept runs: what is committed redraws figures, and nothing is trained for it."
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from refcomm.publish import catalogue, records
from refcomm.files import checkout
from refcomm.papers.sms.items import grid
from refcomm.runs.execute import execute
from refcomm.runs.store import Store

KEPT = records.kept_items(checkout()/"figures"/"records") if checkout() else {}


def cli(*args, **env):
    return subprocess.run([sys.executable, "-c", "from refcomm.cli import main; main()", *args], capture_output=True,
        text=True, env={**os.environ, **env})


@pytest.fixture
def kept(tmp_path):
    store, folder = Store(tmp_path/"runs"), tmp_path/"figures"/"records"
    made = execute(grid("figure2", "smoke", 1), store=store)
    records.keep_item("sms/figure2", [f"{r.experiment}/{r.key}" for r in made], dict(profile="smoke", n_seeds=1),
        folder, store)
    return folder


def test_redraw_makes_the_item_and_trains_nothing(kept, tmp_path):
    r = cli("redraw", "sms/figure2", REFCOMM_FIGURES=str(kept.parent), REFCOMM_HOME=str(tmp_path/"home"))
    assert r.returncode == 0 and "redrawn" in r.stdout, r.stdout + r.stderr
    assert not (tmp_path/"home"/"runs").exists()


def test_redraw_names_a_missing_run(kept, tmp_path):
    index = json.loads((kept/"sms_figure2.json").read_text())
    gone = index["runs"].pop()
    (kept/"sms_figure2.json").write_text(json.dumps(index))
    r = cli("redraw", "sms/figure2", REFCOMM_FIGURES=str(kept.parent), REFCOMM_HOME=str(tmp_path/"home"))
    assert r.returncode == 1 and gone.split("/")[1] in " ".join(r.stdout.split()).replace(" ", ""), r.stdout


def test_an_item_without_records_says_so(kept, tmp_path):
    r = cli("redraw", "sms/figure3", REFCOMM_FIGURES=str(kept.parent), REFCOMM_HOME=str(tmp_path/"home"))
    assert "no records" in r.stdout and r.returncode == 0


def test_items_without_records_are_drawn_from_their_numbers(kept, tmp_path):
    for end in (".csv", ".json", ".png"):
        shutil.copy(checkout()/"figures"/f"sms_equations{end}", kept.parent)
    (kept.parent/"sms_equations.png").write_bytes(b"")
    (kept/"sms_figure2.json").unlink()
    r = cli("redraw", REFCOMM_FIGURES=str(kept.parent), REFCOMM_HOME=str(tmp_path/"home"))
    assert r.returncode == 0 and r.stdout.count("redrawn") == 1, r.stdout + r.stderr
    assert (kept.parent/"sms_equations.png").read_bytes()[1:4] == b"PNG"


def test_an_older_version_is_named(kept, monkeypatch):
    from refcomm.papers.sms.run import SMSSpec
    assert records.outdated(kept) == {}
    monkeypatch.setattr(SMSSpec, "version", SMSSpec.version + 1)
    assert "of version" in records.outdated(kept)["sms/figure2"]


def test_what_is_committed_is_small_and_of_this_version():
    folder = checkout()/"figures"/"records"
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) <= 25*2**20
    assert not records.outdated(folder)


def run_here(item, into):
    "What `refcomm redraw` executes, in this process: a kernel for each item would take most of the time."
    with records.kept_store(item, into=into) as given, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = dict(__name__="__main__", display=lambda *shown: None)
        for c in json.loads(catalogue.notebooks()[item].read_text("utf-8"))["cells"]:
            source = "".join(c["source"])
            if c["cell_type"] == "code" and not source.startswith("#| hide"): exec(source, names)
            if "parameters" in c["metadata"].get("tags", []): names.update(given, jobs=1)
    plt.close("all")


@pytest.mark.parametrize("item", sorted(KEPT))
def test_every_committed_item_is_redrawn(item, tmp_path, monkeypatch):
    figures, stem = checkout()/"figures", item.replace("/", "_")
    monkeypatch.setenv("REFCOMM_FIGURES", str(figures))
    run_here(item, tmp_path)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path/f"{stem}.csv"), pd.read_csv(figures/f"{stem}.csv"))
    old, new = (json.loads(Path(d/f"{stem}.json").read_text()) for d in (figures, tmp_path))
    assert [(c["id"], c["verdict"], c["numbers"]) for c in new["claims"]] == [(c["id"], c["verdict"], c["numbers"])
        for c in old["claims"]]


BAD_INDEX = ["{", "[]", "["*100_000, '{"item": "sms/figure2"}',
    '{"item": 3, "runs": [], "parameters": {}, "stamps": {}}',
    '{"item": "sms/figure2", "runs": ["../../etc/passwd"], "parameters": {}, "stamps": {}}']


@pytest.mark.parametrize("text", BAD_INDEX, ids=lambda t: t[:20])
def test_a_damaged_list_of_kept_runs_is_named_and_the_rest_goes_on(kept, command, monkeypatch, text):
    from refcomm.core import ConfigError
    monkeypatch.setenv("REFCOMM_FIGURES", str(kept.parent))
    (kept/"eqc_table5.json").write_text(text, encoding="utf-8")
    with pytest.warns(UserWarning, match="left out: .*eqc_table5.json is no list of kept runs"):
        assert list(records.kept_items(kept)) == ["sms/figure2"]
    with pytest.raises(ConfigError, match="is no list of kept runs"): records.tidy(kept)
    listed = json.loads((kept/"sms_figure2.json").read_text())["runs"]
    assert len(list(kept.glob("sms/*.parquet"))) == len(listed), "nothing is lost"
    with pytest.warns(UserWarning, match="left out"): r = command("redraw", "eqc/table5")
    assert r.returncode == 1 and "is no list of kept runs" in " ".join(r.stdout.split()) and not r.stderr


def test_a_damaged_kept_run_is_named_and_the_rest_goes_on(kept, command, monkeypatch):
    import random
    from refcomm.core import RecordError
    monkeypatch.setenv("REFCOMM_FIGURES", str(kept.parent))
    path, rng = sorted(kept.glob("sms/*.parquet"))[0], random.Random(0)
    data, rows = path.read_bytes(), records.unpack_run(path, Store(kept/"sound")).rows
    for n in range(60):
        bad = bytearray(data)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        path.write_bytes(bad if n % 2 else data[:rng.randrange(len(data))])
        with records.tempfile.TemporaryDirectory() as d:
            try: record = records.unpack_run(path, Store(Path(d)))
            except RecordError as e: assert len(str(e).splitlines()) == 1
            else: assert (record.key, record.rows) == (path.stem, rows)
    path.write_bytes(data[:100])
    r = command("redraw", "sms/figure2")
    assert r.returncode == 1 and "cannot be read as a kept run" in " ".join(r.stdout.split()) and not r.stderr
    assert "cannot be read as a kept run" in records.outdated(kept)["sms/figure2"]


def test_runs_of_another_store_belong_to_no_item(home, tmp_path):
    "A benchmark trains in temporary stores, which are gone when its runs would be kept."
    from refcomm.papers.eqc.run import EQCSpec
    from refcomm.publish.records import used_runs
    from refcomm.runs.execute import execute
    from refcomm.runs.store import Store
    spec = EQCSpec(bottleneck="continuous", word_length=4, hidden=8, n_train=32, n_valid=16, n_test=16, epochs=1)
    with used_runs() as used:
        execute([spec], store=Store(tmp_path/"other"))
        execute([spec])
    assert used == [f"eqc/{Store().keys()[0][1]}"]
    with used_runs() as used: execute([spec], store=Store(tmp_path/"other"))
    assert not used


def test_a_picture_whose_runs_are_not_enough_is_drawn_from_its_numbers(kept, command, monkeypatch):
    "One command redraws all that is kept; weights and images are not kept."
    from refcomm.publish.catalogue import notebooks
    monkeypatch.setenv("REFCOMM_FIGURES", str(kept.parent))
    assert not records.only_numbers("sms/figure2") and records.only_numbers("sms/figure3")
    index = json.loads((kept/"sms_figure2.json").read_text())
    (kept/"sms_figure2.json").write_text(json.dumps(index | dict(redraw=False)))
    tagged = lambda path: '"draw"' in path.read_text(encoding="utf-8")
    drawn = next(i for i, p in notebooks().items() if i.startswith("patch/") and tagged(p))
    name = drawn.replace("/", "_", 1)
    for kind in ("csv", "json", "png"): shutil.copy(checkout()/"figures"/f"{name}.{kind}", kept.parent)
    before = (kept.parent/f"{name}.csv").read_bytes()
    r = command("redraw", "sms/figure2", drawn)
    assert r.returncode == 0 and "no records" in r.stdout and "picture redrawn" in r.stdout, r.stdout + r.stderr
    assert (kept.parent/f"{name}.csv").read_bytes() == before
