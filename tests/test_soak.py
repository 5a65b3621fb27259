"A seeded part of the soak test: damage to each kind of file that refcomm writes, none of it believed, none of it a traceback."
import random
from pathlib import Path

import pytest

from damage import BYTES, PLACES, TEXT, damaged, subjects
from soak import options

KINDS = ("checkpoint", "members.json", "cache", "recipe", "plan", "archive")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    root = tmp_path_factory.mktemp("soak")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("REFCOMM_HOME", str(root)); m.setenv("REFCOMM_FIGURES", str(root/"figures"))
        yield subjects(root)


@pytest.mark.slow
def test_no_damage_is_believed_and_none_is_a_traceback(found):
    table, wrong = damaged(found, 14*len(KINDS), random.Random(0))
    assert not wrong, wrong
    assert tuple(table) == KINDS and all(sum(c.values()) == 14 for c in table.values())
    assert set(BYTES) | set(PLACES) <= set(found["archive"].kinds) and set(TEXT) <= set(found["recipe"].kinds)
    for name, c in table.items():
        assert c["refused in one line"] + c["set aside, made anew"] >= 9, (name, c)


def test_the_kept_report_is_of_a_soak_that_passed():
    "And of all that `make soak` does."
    import re
    text = Path(__file__).with_name("soak.md").read_text("utf-8")
    assert "Passed: nothing was lost, doubled or believed." in text and "FAILED" not in text
    assert text.splitlines()[2].startswith("`python tests/soak.py` "), "by the defaults, which are the whole of it"
    o = options().parse_args([])
    said = lambda pattern: tuple(map(int, re.search(pattern, text).groups()))
    assert said(r"stopped (\d+) times at random moments") == (o.stops,) and all(f"{k} to" in text for k in
        ("SIGKILL", "SIGTERM", "SIGINT"))
    records, accepted = said(r"(\d+) damaged copies of \d+ records, looked up by their Spec: (\d+) accepted")
    files, others, tracebacks = said(r"(\d+) damaged files of six kinds: (\d+) accepted, (\d+) tracebacks")
    assert (records, accepted) == (o.mutations, 0) and (files, others, tracebacks) == (o.damages, 0, 0)
    assert records >= 1000 <= files and all(re.search(rf"^\| {kind} \|", text, re.M) for kind in KINDS)
    assert "printed 0 tracebacks" in text and "Four drivers" in text and f"{o.times} times" in text
