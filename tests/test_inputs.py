"Tables, plans, corpora and folders from elsewhere: taken as they are meant, or refused in one line."
import errno
import json
import os
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from conftest import PROGRAMS
from refcomm.publish import catalogue
from refcomm import corpora
from refcomm import files
from refcomm.runs import costs
from refcomm.core import ConfigError, StoreError, from_json
from refcomm.data.features import load_features
from refcomm.data.sentences import load_sentences
from refcomm.runs.execute import read_plan
from refcomm.sms import datasets

quick = settings(max_examples=60, suppress_health_check=list(HealthCheck))
anything = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=6)
DEEP = "["*100_000, '{"a":'*100_000, "["*100_000 + "]"*100_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A table of sentences, a corpus, a set of games: sound files, to be spoilt."
    d = tmp_path_factory.mktemp("tables")
    pd.DataFrame(dict(text=["pay a bill", "send a card", "close it", "open it"], category=["a", "a", "b", "b"]),
        index=[3, 1, 4, 2]).to_parquet(d/"sentences.parquet")
    corpora.save_corpus(d/"corpus.parquet", corpora.make_corpus([[1, 2], [0, 2]], [[0], [1]], dict(a=1)))
    from refcomm.core import generator
    from refcomm.sms.sampling import sample_games
    datasets.save_games(d/"games.parquet",
        sample_games(5, 2, n_attributes=4, n_values=3, n_distractors=3, generator=generator(0)))
    return d


READ = {"sentences": lambda p: load_sentences(p), "corpus": corpora.load_corpus, "games": datasets.load_games}
KEYS = {"sentences": b"pandas", "corpus": b"refcomm.corpus", "games": b"refcomm.games"}


def refused_or(read, path):
    try: return read(path)
    except ConfigError as e: assert len(str(e).splitlines()) == 1 and str(e)


@quick
@given(st.sampled_from(list(READ)), anything | st.sampled_from(DEEP) | st.binary(max_size=20), st.data())
def test_a_table_whose_metadata_are_strange_is_read_or_refused_in_one_line(folder, kind, value, pick):
    table = pq.read_table(folder/f"{kind}.parquet")
    known = json.loads(table.schema.metadata[KEYS[kind]])
    if pick.draw(st.booleans()) and not isinstance(value, bytes) and value not in DEEP:
        value = {**known, pick.draw(st.sampled_from(list(known))): value}
    text = value if isinstance(value, bytes) or value in DEEP else json.dumps(value)
    pq.write_table(table.replace_schema_metadata({KEYS[kind]: text}), folder/"odd.parquet")
    found = refused_or(READ[kind], folder/"odd.parquet")
    if kind == "sentences":
        assert found.digest == load_sentences(folder/"sentences.parquet").digest, "what pandas wrote about its frame changes nothing"


@quick
@given(st.sampled_from(list(READ)), st.data())
def test_a_damaged_table_is_read_or_refused_in_one_line(folder, kind, pick):
    data = bytearray((folder/f"{kind}.parquet").read_bytes())
    for place, value in pick.draw(st.lists(st.tuples(st.integers(0, len(data) - 1), st.integers(0, 255)), min_size=1,
        max_size=4)):
        data[place] = value
    (folder/"bad.parquet").write_bytes(data[:pick.draw(st.integers(len(data)//2, len(data)))])
    refused_or(READ[kind], folder/"bad.parquet")


@pytest.mark.parametrize("columns, says",
    [(dict(target=["a"]*5), "shape or type"), (dict(min_symbols=["a"]*5), "min_symbols"),
    (dict(min_symbols=pa.nulls(5)), "min_symbols"), (dict(split=[1]*5), None)])
def test_games_with_columns_of_other_types(folder, columns, says):
    table = pq.read_table(folder/"games.parquet")
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(values) if isinstance(values, list)
            else values)
    pq.write_table(table, folder/"other.parquet")
    if says:
        with pytest.raises(ConfigError, match=says): datasets.load_games(folder/"other.parquet")


def test_a_column_that_is_there_twice_is_named(folder):
    pq.write_table(pa.table([["a"], ["b"], ["c"]], names=["text", "text", "category"]), folder/"twice.parquet")
    with pytest.raises(ConfigError, match="several columns called 'text'"): load_sentences(folder/"twice.parquet")


@pytest.mark.parametrize("text", [*DEEP, "{}", "[1]", "[[]]", '[{"experiment": "eqc", "fields": 3}]',
    '[{"experiment": ["eqc"], "fields": {}}]', '[{"experiment": "eqc", "fields": {"seed": ' + "[", "\udcff", "null",
    "9"*5000])
def test_a_plan_that_is_none(tmp_path, text):
    (tmp_path/"plan.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError) as e: read_plan(tmp_path/"plan.json")
    assert len(str(e.value)) < 1000


def test_a_plan_whose_fields_were_changed_is_refused(tmp_path):
    from refcomm.papers.eqc.run import EQCSpec
    from refcomm.runs.execute import write_plan
    path, specs = tmp_path/"plan.json", [EQCSpec(seed=s) for s in (0, 1)]
    write_plan(specs, path)
    whole = json.loads(path.read_text("utf-8"))
    def read(change):
        entries = json.loads(json.dumps(whole))
        change(entries)
        path.write_text(json.dumps(entries), encoding="utf-8")
        return read_plan(path)
    assert read(lambda e: None) == specs and read(lambda e: e.reverse()) == specs[::-1]
    for change in (lambda e: e[1]["fields"].update(seed=7), lambda e: e[0].update(key="0"*16),
        lambda e: e[1]["fields"].pop("seed"), lambda e: e[0].update(key=3)):
        with pytest.raises(ConfigError, match="the fields beside it make .*take out the key"): read(change)
    with pytest.raises(ConfigError, match="is not a plan"): read(lambda e: e[0].update(kez=e[0].pop("key")))
    assert read(lambda e: (e[1].pop("key"),
        e[1]["fields"].update(seed=7)))[1].seed == 7, "an older or own plan has no keys"


@pytest.mark.parametrize("text", DEEP)
def test_json_that_is_nested_too_deep_elsewhere(tmp_path, home, command, text):
    with pytest.raises(ValueError, match="nested too deep"): from_json(text)
    r = command("reproduce", "eqc/table5", "-p", f"n_seeds={text}")
    assert r.returncode == 2 and len(r.stderr) < 500 and len(r.stderr.splitlines()) == 1
    (tmp_path/"data"/"v").mkdir(parents=True)
    (tmp_path/"data"/"v"/"corpus.jsonl").write_text("[1]\n" + text)
    with pytest.raises(ConfigError, match="line 2, is no JSON .*nested too deep"): corpora.load_elcc(tmp_path)
    about = []
    for _ in range(5000): about = [about]
    with pytest.raises(ConfigError, match="must be a dict of numbers, text or lists"):
        corpora.make_corpus([[1]], about=dict(a=about))
    (tmp_path/"eqc_x.json").write_text(text)
    (tmp_path/"eqc_y.json").write_text('{"paper": "eqc", "item": "y", "profile": "cpu", "sha256": "edited"}')
    with pytest.warns(UserWarning, match="eqc_x.json is no recipe"): assert list(costs.shipped(tmp_path)) == ["eqc/y"]


def test_an_h5_takes_nothing_from_other_files(tmp_path):
    h5py = pytest.importorskip("h5py")
    secret, source, path = tmp_path/"secret.h5", tmp_path/"raw.bin", tmp_path/"x.h5"
    with h5py.File(secret, "w") as f: f["v"] = np.ones((4, 3))
    source.write_bytes(np.ones(12).tobytes()); (tmp_path/"x.txt").write_text("a\nb\na\nb\n")
    def external(f): f["v"] = h5py.ExternalLink(str(secret), "/v")
    def soft(f): f.create_group("g"); f["g"]["v"] = np.ones((4, 3)); f["v"] = h5py.SoftLink("/g/v")
    def raw(f): f.create_dataset("v", (4, 3), "f8", external=[(str(source), 0, 96)])
    def virtual(f):
        layout = h5py.VirtualLayout((4, 3), "f8")
        layout[:] = h5py.VirtualSource(str(secret), "v", (4, 3))
        f.create_virtual_dataset("v", layout)
    def group(f): f.create_group("v")
    for make in (external, soft, raw, virtual, group):
        with h5py.File(path, "w") as f: make(f)
        with pytest.raises(ConfigError, match="cannot be read as .h5 with one table"): load_features(path)
    with h5py.File(path, "w") as f: f["v"] = np.ones((4, 3))
    assert load_features(path).x.shape == (4, 3)


def test_a_full_disk_while_features_are_kept_is_one_error(home, monkeypatch):
    "safetensors words the system's refusal in its own way."
    import safetensors.torch
    from safetensors import SafetensorError
    def full(*a, **k):
        raise SafetensorError('Error while serializing: I/O error: No space left on device (os error 28)')
    with monkeypatch.context() as m:
        m.setattr(safetensors.torch, "save_file", full)
        with pytest.raises(StoreError, match="the disk is full: free some space, or set REFCOMM_HOME"):
            files.cached_tensor(home/"x.safetensors", lambda: torch.ones(3), "features")
    assert not list(home.glob("*.safetensors*")) and not list(home.glob(".*"))
    assert files.cached_tensor(home/"x.safetensors", lambda: torch.ones(3), "features").shape == (3,)


def test_the_words_of_safetensors_for_a_refusal_of_the_system(home):
    "A limit on the size of files is as good as a full disk."
    r = subprocess.run([sys.executable, PROGRAMS/"small_files_only.py"], capture_output=True, text=True)
    assert (r.returncode == 1 and "StoreError: cannot write" in r.stderr.splitlines()[-1]
        and os.strerror(errno.EFBIG) in r.stderr and not list(home.glob("*.safetensors")))


@pytest.mark.parametrize("variable", ["REFCOMM_HOME", "REFCOMM_FIGURES", "REFCOMM_DATA"])
@pytest.mark.parametrize("value, says",
    [("~nobody-of-this-name/x", "no home folder of that user"), ("/tmp/" + "x"*300, "too long|no figures in|no 'pets'"),
    ("/dev/null/x", "cannot write|Not a directory|is not a folder|no figures in|no 'pets'")])
def test_folders_that_cannot_be_are_one_line_each(home, command, monkeypatch, variable, value, says):
    from refcomm.data.images import load_images
    monkeypatch.setenv(variable, value)
    calls = {"REFCOMM_HOME": [("runs", "list"), ("runs", "verify"), ("plan", "eqc/table5", "--profile", "smoke"),
        ("reproduce", "eqc/table1", "--profile", "smoke")], "REFCOMM_FIGURES": [("report",)],
        "REFCOMM_DATA": []}[variable]
    for args in calls:
        r = command(*args)
        assert len(r.stderr.splitlines()) <= 1 and (r.returncode == 0
            or re.search(says, " ".join((r.stderr + r.stdout).split())))
    if variable == "REFCOMM_HOME": assert r.returncode
    if variable == "REFCOMM_DATA":
        with pytest.raises(ConfigError, match=says): load_images("pets")


@pytest.mark.parametrize("name", ["x"*300, "x"*5000, "a\0b", "~nobody-of-this-name/x.parquet", "x"*300 + ".parquet", "/"
    + "x/"*3000])
def test_sources_with_impossible_names(monkeypatch, tmp_path, name):
    from refcomm.data.images import load_images
    monkeypatch.setenv("REFCOMM_DATA", str(tmp_path))
    for load in (load_images, load_sentences, load_features):
        with pytest.raises(ConfigError) as e: load(name)
        assert len(str(e.value).splitlines()) == 1


# packages and what they may run
def test_holes_that_are_known_are_shut_out_by_lower_bounds():
    import tomllib
    from conftest import ROOT
    from packaging.requirements import Requirement
    needed = {r.name: r.specifier for r in map(Requirement,
        tomllib.loads((ROOT/"pyproject.toml").read_text("utf-8"))["project"]["dependencies"])}
    for name, bad in [("pyarrow", "14.0.0"), ("pillow", "10.2.0"), ("pillow", "11.2.1"), ("pyyaml", "5.3"),
        ("jinja2", "3.1.5"), ("filelock", "3.20.0"), ("tqdm", "4.66.2"), ("scikit-learn", "1.4"), ("datasets", "3.6"),
        ("transformers", "4.52")]:
        assert not needed[name].contains(bad), f"{name} {bad}"


def test_no_model_runs_code_of_its_own(tmp_path, monkeypatch, home):
    from conftest import tiny_transformer
    from refcomm.data.embeddings import embed
    folder = tiny_transformer(tmp_path/"model", ["one two"])
    config = json.loads((folder/"config.json").read_text("utf-8")) | dict(model_type="evil",
        auto_map=dict(AutoConfig="evil.C", AutoModel="evil.M", AutoTokenizer=["evil.T", None]))
    (folder/"config.json").write_text(json.dumps(config)); (folder/"evil.py").write_text(f"open({str(tmp_path/'broken into')!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("a question was put to the user"))
    with pytest.raises(ConfigError, match="cannot load a sentence encoder"): embed(["one"], str(folder))
    assert not (tmp_path/"broken into").exists()


def test_every_automatic_class_is_told_not_to_run_code():
    import ast
    from pathlib import Path
    import refcomm
    calls = [n for p in Path(refcomm.__file__).parent.rglob("*.py") for n in ast.walk(ast.parse(p.read_text("utf-8")))
        if isinstance(n, ast.Call) and ast.unparse(n.func).startswith("Auto")
        and ast.unparse(n.func).endswith("from_pretrained")]
    assert len(calls) >= 4
    for n in calls:
        assert any(k.arg == "trust_remote_code" and k.value.value is False for k in n.keywords), ast.unparse(n)


def test_text_files_have_one_encoding(tmp_path):
    "Under a locale of few letters, too: every call that opens a file as text names the encoding."
    import ast
    from pathlib import Path
    import refcomm
    bare = []
    for p in Path(refcomm.__file__).parent.rglob("*.py"):
        for n in ast.walk(ast.parse(p.read_text("utf-8"))):
            if not isinstance(n, ast.Call): continue
            name, keys = ast.unparse(n.func), {k.arg for k in n.keywords}
            positional = [a.value for a in n.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            if name.endswith((".read_text", ".write_text")) and "encoding" not in keys and "utf-8" not in positional:
                bare.append((p.name, ast.unparse(n)[:80]))
            if name == "open" and "encoding" not in keys and not any("b" in m for m in positional if len(m) <= 3):
                bare.append((p.name, ast.unparse(n)[:80]))
            if name.startswith("subprocess.") and {"text", "universal_newlines"} & keys and "encoding" not in keys:
                bare.append((p.name, ast.unparse(n)[:80]))
    assert not bare


# parameters
@pytest.mark.parametrize("given, says",
    [("n_seeds=-1", "n_seeds must be at least 1, got -1"), ("n_seeds=0", "n_seeds must be at least 1"),
    ("n_seeds=true", "n_seeds is int, got True"), ("n_seeds=1e3", "n_seeds is int, got 1000.0"),
    ("device=gpu", "unknown device 'gpu'"), ("images=NaN", "images is str, got nan")])
def test_an_impossible_parameter_is_refused_before_a_kernel_starts(home, command, monkeypatch, given, says):
    from refcomm import cli
    monkeypatch.setattr(cli, "reproduce_item", lambda *a: pytest.fail("a kernel was started"))
    for args in (("reproduce", "eqc/table5", "-p", given), ("plan", "eqc/table5", "-p", given)):
        r = command(*args)
        assert r.returncode == 2 and says in r.stderr and len(r.stderr.splitlines()) == 1
    assert "jobs must be at least 1, got -2" in command("reproduce", "eqc/table5", "--jobs", "-2").stderr


@pytest.mark.parametrize("given, says",
    [(dict(n_seed=5), "no parameter 'n_seed': did you mean 'n_seeds'"),
    (dict(n_seeds=-1), "n_seeds must be at least 1, got -1"), (dict(n_seeds="3"), "n_seeds is int, got '3'"),
    (dict(profile="cpuu"), "unknown profile 'cpuu'")])
def test_a_notebook_refuses_what_papermill_would_pass_on(tmp_path, given, says):
    import papermill
    code = lambda source, *tags: dict(cell_type="code", id=str(abs(hash(source)))[:8], metadata=dict(tags=list(tags)),
        source=source, outputs=[], execution_count=None)
    cells = [code('profile: str = "smoke" # a comment\nn_seeds: int = 3', "parameters"),
        code("from refcomm.core import check_injected\ncheck_injected(globals())"), code("open('computed', 'w')")]
    (tmp_path/"toy.ipynb").write_text(json.dumps(dict(cells=cells,
        metadata=dict(kernelspec=dict(name="python3", display_name="Python 3", language="python")), nbformat=4,
        nbformat_minor=5)))
    with pytest.raises(papermill.PapermillExecutionError) as e:
        papermill.execute_notebook(str(tmp_path/"toy.ipynb"), str(tmp_path/"out.ipynb"), given, progress_bar=False,
            cwd=str(tmp_path), kernel_name="python3")
    assert says in e.value.evalue and not (tmp_path/"computed").exists()


def test_every_paper_and_benchmark_notebook_refuses_unknown_parameters():
    for item, path in catalogue.notebooks().items():
        cells = json.loads(path.read_text("utf-8"))["cells"]
        at = next(i for i, c in enumerate(cells) if "parameters" in c["metadata"].get("tags", []))
        after = next(c for c in cells[at + 1:] if c["cell_type"] == "code")
        assert "check_injected(globals())" in "".join(after["source"]), item


def test_a_dry_run_executes_nothing(home, command, monkeypatch):
    from refcomm import cli
    monkeypatch.setattr(cli, "reproduce_item", lambda *a: pytest.fail("a kernel was started"))
    r = command("reproduce", "eqc/table1", "sms/figure1", "--profile", "smoke", "--dry-run")
    assert r.returncode == 0 and r.stdout.count("to do") == 2 and not home.exists()
    monkeypatch.setattr(cli, "found_done", lambda item, *a: item == "sms/figure1")
    assert command("reproduce", "eqc/table1", "sms/figure1", "--dry-run").stdout.count("found done") == 1
    assert command("reproduce", "sms/figure1", "--dry-run", "--force").stdout.count("to do") == 1


def test_the_version(command, tmp_path):
    import refcomm
    assert command("--version").stdout == f"refcomm {refcomm.__version__}\n"
    r = subprocess.run([sys.executable, "-m", "refcomm", "--version"], capture_output=True, text=True, cwd=tmp_path)
    assert r.returncode == 0 and r.stdout == f"refcomm {refcomm.__version__}\n"


# bombs: few bytes on the disk, many in memory
def says_four_gibibytes(path):
    "Change the size of a zip file's last member as the file's directory has it."
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\x01\x02")
    data[at + 24:at + 28] = (2**32 - 2).to_bytes(4, "little")
    path.write_bytes(data)


def test_packed_features_that_would_fill_the_memory_are_refused(tmp_path):
    import zipfile
    with zipfile.ZipFile(tmp_path/"x.npz", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x.npy", b"\x93NUMPY\x01\x00")
    says_four_gibibytes(tmp_path/"x.npz")
    with pytest.raises(ConfigError,
        match="would unpack to 4,294,967,294 bytes, more than a hundred times its own size"):
        load_features(tmp_path/"x.npz")


def test_an_h5_that_would_fill_the_memory_is_refused(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path/"x.h5", "w") as f:
        f.create_dataset("x", (2**29, 1), "f8", chunks=(2**20, 1), compression="gzip")
    (tmp_path/"x.txt").write_text("a\nb\n", encoding="utf-8")
    assert (tmp_path/"x.h5").stat().st_size < 2**20
    with pytest.raises(ConfigError, match="would unpack to 4,294,967,296 bytes"): load_features(tmp_path/"x.h5")


def test_a_parquet_file_of_few_bytes_and_many_rows_is_refused(tmp_path, monkeypatch):
    from refcomm.corpora import load_corpus
    from refcomm.data.images import load_images
    from refcomm.own import load_objects
    monkeypatch.setattr(files, "most_unpacked", lambda path: 100*path.stat().st_size) # two million rows in place of two thousand million
    table = pa.table({k: pa.nulls(2_000_000, pa.int8()) for k in ("text", "category", "image", "label")})
    pq.write_table(table, tmp_path/"x.parquet")
    assert (tmp_path/"x.parquet").stat().st_size < 20_000
    for load in (load_sentences, load_corpus, load_images, load_objects):
        with pytest.raises(ConfigError, match="would unpack to .* more than a hundred times"):
            load(tmp_path/"x.parquet")


def test_a_dump_that_would_fill_the_memory_is_refused(tmp_path):
    import zipfile
    from refcomm.egg import load_egg
    with zipfile.ZipFile(tmp_path/"x.pt", "w", zipfile.ZIP_DEFLATED) as file: file.writestr("archive/data.pkl", b"")
    says_four_gibibytes(tmp_path/"x.pt")
    with pytest.raises(ConfigError, match="would unpack to 4,294,967,294 bytes"): load_egg(tmp_path/"x.pt")
