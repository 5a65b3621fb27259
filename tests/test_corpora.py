"Corpora: written, read back, read by others, and refused where they are damaged."
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refcomm.core import ConfigError, StoreError, generator
from refcomm.corpora import describe, from_record, load_corpus, load_elcc, make_corpus, save_corpus, save_elcc
from refcomm.runs.store import RunResult, Store, provenance


def some(n=40, length=3, seed=0, **about):
    g = generator(seed)
    return make_corpus(torch.randint(9, (n, length), generator=g), torch.randint(4, (n, 2), generator=g),
        dict(seed=seed, **about))


def same(a, b):
    return (torch.equal(a.messages, b.messages)
        and (a.meanings is b.meanings is None or torch.equal(a.meanings, b.meanings)) and a.about == b.about)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), n=st.integers(1, 6), length=st.integers(1, 4),
    most=st.sampled_from([1, 255, 256, 40_000, 2**40]), known=st.booleans(),
    about=st.dictionaries(st.text(), st.none() | st.integers(-5, 5) | st.text(), max_size=3))
def test_what_is_written_is_read(tmp_path, data, n, length, most, known, about):
    rows = st.lists(st.lists(st.integers(0, most), min_size=length, max_size=length), min_size=n, max_size=n)
    corpus = make_corpus(data.draw(rows), data.draw(rows) if known else None, about)
    assert same(load_corpus(save_corpus(tmp_path/"c.parquet", corpus)), corpus)
    folder = tmp_path/str(len(list(tmp_path.iterdir())))
    assert same(load_elcc(save_elcc(folder, {"a": corpus}, "game")), corpus)
    assert [json.loads(line)
        for line in (folder/"data"/"a"/"corpus.jsonl").read_text().splitlines()] == corpus.messages.tolist()


def test_datasets_reads_the_file_and_the_folder(tmp_path):
    import datasets
    datasets.disable_progress_bars()
    a, b = some(), some(30, 5, seed=1)
    read = lambda *where, **how: datasets.load_dataset(*where, split="train", cache_dir=str(tmp_path/"cache"), **how)
    assert read("parquet", data_files=str(save_corpus(tmp_path/"c.parquet", a)))["message"][:] == a.messages.tolist()
    folder = str(save_elcc(tmp_path/"game", {"seed-0": a, "seed-1": b}, "game"))
    for variant, corpus in (("seed-0", a), ("seed-1", b)):
        theirs = read(folder, variant)
        assert theirs["message"][:] == corpus.messages.tolist() and theirs["meaning"][:] == corpus.meanings.tolist()


def test_the_card_and_the_metadata_say_what_is_there(tmp_path):
    a = some(note="naïve")
    folder = save_elcc(tmp_path/"game", {"seed-0": a, "seed-1": make_corpus(a.messages)}, "A game: of shapes",
        paper="https://example.org/paper", license="cc-by-4.0", observation_type="image")
    front, card = (folder/"README.md").read_text(encoding="utf-8").removeprefix("---\n").split("\n---\n", 1)
    front, system = yaml.safe_load(front), yaml.safe_load((folder/"metadata.yml").read_text(encoding="utf-8"))
    assert front["pretty_name"] == "A game: of shapes" and front["license"] == "cc-by-4.0"
    assert [c["config_name"] for c in front["configs"]] == ["seed-0",
        "seed-1"] and all((folder/c["data_files"]).is_file() for c in front["configs"])
    assert (system["origin"]["paper"] == "https://example.org/paper" and system["system"]["observation_type"] == "image"
        and system["system"]["game_type"] == "signalling")
    assert system["system"]["variants"]["seed-0"] == dict(seed=0, note="naïve")
    numbers = json.loads((folder/"data"/"seed-0"/"metadata.json").read_text(encoding="utf-8"))
    assert numbers == dict(describe(a),
        about=a.about) and numbers["n_messages"] == 40 and numbers["message_length"] == 3
    assert (f"| seed-0 | 40 | {numbers['n_unique_messages']} | 3 | 9 | {numbers['message_bits']:.2f} | 2 |" in card
        and "| seed-1 | 40 |" in card and "naïve" in card)
    assert "license" not in yaml.safe_load((save_elcc(tmp_path/"other", {"a": a},
        "x")/"README.md").read_text().split("---\n")[1])


def test_ELCCs_own_folders_are_read(tmp_path):
    here = tmp_path/"system"/"data"/"variant"
    here.mkdir(parents=True)
    (here/"corpus.jsonl").write_text("[3, 1]\n[0, 2]\n[3,1]")
    (here/"metadata.json").write_text("{}")
    found = load_elcc(tmp_path/"system")
    assert found.messages.tolist() == [[3, 1], [0, 2], [3, 1]] and found.meanings is None and found.about == {}
    (here/"corpus.jsonl").write_text("[3, 1]\n[0]\n[]\n")
    found = load_elcc(tmp_path/"system")
    assert found.lengths.tolist() == [2, 1, 0] and found.messages.tolist() == [[3, 1], [0, -1], [-1, -1]]
    (here/"corpus.jsonl").write_text("[3, 1]\n[-1]\n")
    with pytest.raises(ConfigError, match="messages must be numbered from 0, got -1 in message 1"):
        load_elcc(tmp_path/"system")


def test_every_flipped_bit_is_seen(tmp_path):
    "A damaged file is refused, or what is read is what was written."
    corpus = some(200)
    raw, bad = save_corpus(tmp_path/"c.parquet", corpus).read_bytes(), tmp_path/"bad.parquet"
    refused = 0
    for i in range(4, len(raw), 11):
        bad.write_bytes(raw[:i] + bytes([raw[i] ^ 16]) + raw[i+1:])
        try: found = load_corpus(bad)
        except ConfigError: refused += 1
        else: assert same(found, corpus), i
    assert refused > 50
    for i in (0, 1, 100, len(raw) - 1):
        bad.write_bytes(raw[:i])
        with pytest.raises(ConfigError, match="cannot be read as parquet"): load_corpus(bad)


@pytest.mark.parametrize("table,message", [
    (dict(message=[[1], [1, 2]]), "it does not hold what was written"), # of different lengths, and so no fault
    (dict(message=[[1], [2]], meaning=[[1], [1, 2]]), "meaning 1 has 2 entries, meaning 0 has 1"),
    (dict(message=[[1], [-1]]), "messages must be numbered from 0, got -1"),
    (dict(message=[[1], None]), "message 1 is None: a list of integers is expected"),
    (dict(message=[[1], [None]]), "messages must be lists of integers"),
    (dict(message=[[1.5]]), "messages must be integers, got float32"),
    (dict(message=[1, 2]), "message 0 is 1: a list of integers is expected"),
    (dict(message=[[1]], meaning=[["red"]]), "meanings must be lists of integers"),
    (dict(meaning=[[1]]), "not a corpus"),
    (dict(message=[[1]]), "it does not hold what was written"),
])
def test_foreign_tables_are_refused(tmp_path, table, message):
    pq.write_table(pa.table(table).replace_schema_metadata({"refcomm.corpus": '{"about": {}, "digest": ""}'}),
        tmp_path/"t.parquet")
    with pytest.raises(ConfigError) as e: load_corpus(tmp_path/"t.parquet")
    assert message in str(e.value) and "t.parquet" in str(e.value)


@pytest.mark.parametrize("about", [None, b"[1]", b"3", b"{", b"\xff", b"{}", b'{"about": 1, "digest": ""}'])
def test_metadata_that_is_not_ours_is_refused(tmp_path, about):
    pq.write_table(pa.table(dict(message=[[1]])).replace_schema_metadata(about and {"refcomm.corpus": about}),
        tmp_path/"t.parquet")
    with pytest.raises(ConfigError, match="not a corpus: write it with save_corpus"): load_corpus(tmp_path/"t.parquet")


@pytest.mark.parametrize("call,message", [
    (lambda p, c: make_corpus([[1, 2], [3]], [[1, 2], [3]]), "meaning 1 has 1 entries, meaning 0 has 2"),
    (lambda p, c: make_corpus(c.messages, lengths=torch.full((40,), 4)), "lengths must lie in 0 … 3, got 4"),
    (lambda p, c: make_corpus(c.messages, lengths=torch.full((3,), 1)), "lengths must be [40] whole numbers"),
    (lambda p, c: make_corpus([[-1]]), "messages must be numbered from 0, got -1"),
    (lambda p, c: make_corpus([[2**70]]), "messages must be lists of integers"),
    (lambda p, c: make_corpus([[True]]), "messages must be integers, got bool"),
    (lambda p, c: make_corpus(torch.zeros(3)), "messages must be [n, width]"),
    (lambda p, c: make_corpus(c.messages, c.meanings[:3]), "40 messages but 3 meanings"),
    (lambda p, c: make_corpus(c.messages, -c.meanings - 1), "meanings must be numbered from 0"),
    (lambda p, c: make_corpus(c.messages, about=dict(x=float("nan"))), "must be a dict of numbers"),
    (lambda p, c: load_corpus(p/"none.parquet"), "make it with save_corpus"),
    (lambda p, c: load_elcc(p/"none"), "no folder data with variants in it"),
    (lambda p, c: save_elcc(p, {"a": c}, "x"), "exists: name a folder that does not"),
    (lambda p, c: save_elcc(p/"n", {}, "x"), "there are no corpora"),
    (lambda p, c: save_elcc(p/"n", {"a/b": c}, "x"), "variant 'a/b' is no name of a folder"),
    (lambda p, c: save_elcc(p/"n", {"..": c}, "x"), "variant '..' is no name of a folder"),
    (lambda p, c: save_elcc(p/"n", {"a": c}, "x", gametype="y"), "did you mean 'game_type'"),
    (lambda p, c: save_elcc(p/"n", {"a": c._replace(messages=c.messages - 1)}, "x"),
    "messages must be numbered from 0"),
])
def test_bad_input_is_named_and_leaves_nothing(tmp_path, call, message):
    with pytest.raises(ConfigError) as e: call(tmp_path, some())
    assert message in str(e.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("text,message", [
    ("[1, 2]\n[1,", "line 2, is no JSON"), ("[1, 2]\n\n[1, 2]\n", "line 2, is no JSON"),
    ("[1, 2]\n[1, 2, 3]\n", "hold different messages"),
    ('{"a": 1}\n', "a list of integers is expected"), ("[1, -2]\n", "numbered from 0, got -2"),
    ("[1, 0.5]\n", "must be integers"), ('["a", 1]\n', "must be lists of integers"),
    ("", "at least one row"), ("[1, 2, 3]\n", "hold different messages"),
])
def test_damaged_lines_are_named(tmp_path, text, message):
    folder = save_elcc(tmp_path/"game", {"a": some()}, "x")
    (folder/"data"/"a"/"corpus.jsonl").write_text(text)
    with pytest.raises(ConfigError) as e: load_elcc(folder)
    assert message in str(e.value)
    (folder/"data"/"a"/"corpus.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not text"): load_elcc(folder)


def test_a_refusing_disk_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("os.rename", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(StoreError, match="the disk is full"): save_elcc(tmp_path/"game", {"a": some()}, "x")
    assert not list(tmp_path.iterdir())


def test_runs_become_corpora(tmp_path, small):
    from refcomm.papers.eqc import run as eqc
    from refcomm.papers.sms import run as sms
    from refcomm.games.referential import EveryObject
    store, g = Store(tmp_path/"runs"), generator(0)
    put = lambda s, **tensors: store.put(s, RunResult([], {}, [], tensors), dict(provenance("cpu", 0, 1), commit="abc"))
    s = sms.SMSSpec(n_attributes=5, n_values=3, n_distractors=7, n_train=60, n_valid=40, alphabet_size=15,
        sampler="tilted")
    sent = torch.randint(15, (40, 2), generator=g, dtype=torch.uint8)
    found = from_record(put(s, messages=sent))
    assert torch.equal(found.messages, sent.long()) and torch.equal(found.meanings,
        sms.make_task(s).values["valid"][:, 0].long())
    assert (found.about["experiment"] == "sms" and found.about["spec"]["n_valid"] == 40
        and found.about["made"]["commit"] == "abc")
    s = small(bottleneck="quantized", alphabet_size=4)
    task, words = eqc.make_task(s), torch.randint(4, (s.n_test, 1, 20), generator=g, dtype=torch.uint8)
    record = put(s, alphabet_4=words, alphabet_None=words.float())
    found = from_record(record)
    assert torch.equal(found.messages, words[:, 0].long()) and torch.equal(found.meanings,
        EveryObject(task.world).values(task.ids["test"]))
    assert same(load_elcc(save_elcc(tmp_path/"game", {"run": found}, "object game")), found)
    with pytest.raises(ConfigError, match="did you mean 'alphabet_4'"): from_record(record, "alphabet_8")


def test_the_meanings_of_a_run_are_what_its_games_were_about(small):
    "Train for real: the protocol is about what `meanings` says."
    from refcomm.papers.eqc import run as eqc
    from refcomm.metrics.structure import measure
    from refcomm.runs.execute import Context
    s = small(bottleneck="quantized", alphabet_size=4, epochs=1)
    result, = eqc.run([s], Context("cpu"))
    found = measure("topsim", result.tensors["alphabet_4"].flatten(1), eqc.meanings(s), generator(0), 0, 99,
        message_distance="hamming")
    assert found.value > .2 and found.p == .01


def test_runs_that_say_nothing_are_refused(tmp_path):
    from refcomm.papers.iac.run import IACSpec
    from refcomm.papers.sms.run import SMSSpec
    store, sent = Store(tmp_path/"runs"), torch.zeros(5, 2, dtype=torch.uint8)
    put = lambda s, **tensors: store.put(s, RunResult([], {}, [], tensors), provenance("cpu", 0, 1))
    with pytest.raises(ConfigError, match="there is no 'imagenet'"):
        from_record(put(IACSpec(), sent=sent))
    with pytest.raises(ConfigError, match=r"sent no symbols, only real numbers \(x\)"):
        from_record(put(SMSSpec(), x=torch.rand(5, 2)))
    with pytest.raises(ConfigError, match="messages of 2 kinds: name one of a, b"):
        from_record(put(SMSSpec(seed=1), a=sent, b=sent + 1))
