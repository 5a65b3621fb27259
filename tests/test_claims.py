"Claims, verdicts and deviations: tables, rule and statistics against independent references."
import dataclasses
import importlib
import json
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats

from conftest import ROOT
from refcomm.publish import catalogue
from refcomm.papers.claims import VERDICTS, Answer, answer, check_claim, claims, counted, verdict
from refcomm.core import PROFILES, ConfigError
from refcomm.papers.deviations import deviations, incomplete, reach
from refcomm.papers.eqc import spec as eqc
from refcomm.metrics.statistics import Estimate, combine, detectable, estimate, interval, mean_interval, share_interval
from refcomm.papers.evidence import PAPERS, compare, summarize

ALL = pd.concat([claims(p).assign(paper=p) for p in (*PAPERS, "beyond")], ignore_index=True)
number = st.floats(-10, 10)
measured = st.builds(lambda v, se, n: Estimate(v, se, n - 1, 0., n), number, st.floats(0, 5), st.integers(2, 10))


@given(st.booleans(), st.booleans(), st.booleans())
def test_the_verdict_follows_from_answer_and_scale(true, false, near):
    word = verdict(Answer(true, false and not true, ()), near)
    assert word in VERDICTS
    assert (word == "reproduced") == true
    assert (word == "refuted") == (not true and false and near)
    assert (word == "not seen at this scale") == (not true and false and not near)
    assert (word == "undecided") == (not true and not false)
    assert verdict(None, near) == "untestable here"


@given(measured, measured, number)
@settings(max_examples=200, deadline=None)
def test_a_test_and_its_negation_never_agree(x, y, c):
    for test, other in (("x > y", "x <= y"), ("x >= c", "x < c"), ("x > y and x > c", "not (x > y and x > c)")):
        a, b = answer(test, dict(x=x, y=y, c=c)), answer(other, dict(x=x, y=y, c=c))
        assert not (a.true and a.false) and not (a.true and b.true)
    low, high = interval(combine([(1, x), (-1, y)]))
    a = answer("x > y", dict(x=x, y=y))
    assert a.true == (low > 0) and a.false == (high < 0 or high == low == 0)


@given(st.lists(measured, min_size=1, max_size=4), number)
@settings(max_examples=100, deadline=None)
def test_many_values_are_a_conjunction(values, c):
    many = {f"v{i}": v for i, v in enumerate(values)}
    by_name = answer("x > c", dict(x=many, c=c))
    by_and = answer(" and ".join(f"{k} > c" for k in many), many | dict(c=c))
    assert by_name[:2] == by_and[:2]


@given(measured)
@settings(deadline=None)
def test_wider_errors_never_decide_more(x):
    wide = x._replace(se=2*x.se + .1)
    for test in ("x > 0", "abs(x) <= 1"):
        a, b = answer(test, dict(x=x)), answer(test, dict(x=wide))
        assert (not b.true or a.true) and (not b.false or a.false)


@pytest.mark.parametrize("k, n", [(0, 10), (3, 10), (10, 10), (650, 1000), (1024, 1024)])
def test_share_intervals_are_clopper_pearson(k, n):
    low, high = share_interval(k/n, n)
    assert low == pytest.approx(0. if k == 0 else stats.beta.ppf(.025, k, n - k + 1)) and high == pytest.approx(1.
        if k == n else stats.beta.ppf(.975, k + 1, n - k))
    assert high > low


def test_intervals_and_differences_are_scipys():
    a, b = np.array([.61, .65, .70]), np.array([.40, .55, .46])
    welch = stats.ttest_ind(a, b, equal_var=False).confidence_interval()
    assert interval(combine([(1, estimate(a)), (-1, estimate(b))])) == pytest.approx(tuple(welch))
    assert mean_interval(a) == pytest.approx(stats.t.interval(.95, 2, a.mean(), stats.sem(a)))


def test_hierarchical_intervals_cover():
    rng, hits, n_targets = np.random.default_rng(0), 0, 200
    for _ in range(400): # targets are common to the seeds: a hard target is hard for all
        p = np.clip(rng.normal(.7, .05, 3), 0, 1)
        luck = rng.random(n_targets)
        low, high = mean_interval([(luck < q).mean() for q in p], n_targets)
        hits += low < .7 < high
    assert hits/400 >= .93


def test_single_runs_decide_no_difference():
    one, other = estimate([.9], 1000), estimate([.1], 1000)
    assert answer("x > y", dict(x=one, y=other))[:2] == (False,
        False) and math.isnan(detectable(combine([(1, one), (-1, other)])))
    assert answer("x > 0.5", dict(x=one))[0] and "single runs" in check_claim(dict(ALL.iloc[0], test="x > y"),
        dict(x=one, y=other))["cause"]


def test_ceilings_and_cells_counted_elsewhere_do_not_count():
    rows = pd.DataFrame([dict(row="CN-RNN", column=c, seed=s, accuracy=1., n_targets=1000) for c in ("2", "10")
        for s in range(3)])
    assert compare(summarize(rows, whole=1), "eqc", "table5").within.tolist() == [None, None]
    lower = rows.assign(accuracy=.9 + .001*rows.seed)
    assert compare(summarize(lower, whole=1), "eqc", "table5").within.tolist() == [False, False]
    assert compare(summarize(lower, whole=1), "eqc", "table5", "figure3").within.tolist() == [None, None]


def test_no_two_claims_read_alike():
    assert ALL["id"].is_unique and ALL.sentence.is_unique
    assert ALL.sentence.str.lower().str.replace(r"\W", "", regex=True).is_unique
    assert (ALL["id"].str.partition(".")[0] == ALL.paper).all() and set(ALL.kind) == {"result", "check"}
    assert (ALL.source.ne("") | ALL.ours).all(), "a claim of a paper has its place there"


def test_claims_about_one_game_name_it():
    for row in ALL[ALL.paper == "eqc"].itertuples():
        if row.game in ("Object", "Image", "Sent-Ref", "Sent-Cls"):
            assert f"the {row.game} game" in row.sentence, row.id
    assert ALL.sentence.str.endswith(".").all() and not ALL.sentence.str.contains("on-par|dealt|at work").any()


def test_kept_recipes_have_the_words_of_the_tables():
    table = ALL.set_index("id")
    for path in sorted((ROOT/"figures").glob("*.json")):
        for c in json.loads(path.read_text())["claims"]:
            if c["id"] in table.index and table.test[c["id"]] == c["test"]:
                assert c["sentence"] == table.sentence[c["id"]], f"{path.name}: python .ci/kept.py copies the words of {c['id']}"


def test_tests_are_expressions():
    import ast
    for row in ALL.itertuples():
        names = {n.id for n in ast.walk(ast.parse(row.test, mode="eval")) if isinstance(n, ast.Name)} - {"abs"}
        assert names, row.id
        assert answer(row.test, {n: estimate([.1, .2, .4]) for n in names}).parts, row.id


def test_every_claim_belongs_to_a_notebook_and_the_other_way_round():
    with_claims = {f"{r.paper}/{r.item}" for r in ALL.itertuples()}
    checked = set()
    for item, path in catalogue.notebooks().items():
        paper, name = item.split("/")
        source = "\n".join("".join(c["source"]) for c in json.loads(path.read_text())["cells"]
            if c["cell_type"] == "code")
        assert "evidence.Claim" not in source, f"{item}: claims are rows of the table"
        if f'check_claims("{paper}", "{name}"' in source: checked.add(item)
    assert checked == with_claims


def test_the_counts_leave_out_our_own_and_checks():
    rows = [dict(verdict="reproduced", ours=o, kind=k)
        for o, k in ((False, "result"), (True, "result"), (False, "check"))]
    assert sum(counted(rows).values()) == 1 and sum(counted(rows, ours=True).values()) == 1


PRINTED = { # what the Spec's own defaults do not hold
    "image": dict(data="imagenet-vgg", encoder="vgg"),
    "sent-ref": dict(data="banking77", encoder="distilbert-base-uncased"),
    "sent-cls": dict(data="banking77", encoder="distilbert-base-uncased", fine_tune=True), "object": {},
}


@pytest.mark.parametrize("paper", PAPERS)
def test_deviations_are_complete(paper):
    items = importlib.import_module(f"refcomm.papers.{paper}.items")
    specs = {}
    for profile in PROFILES:
        own = dict(iac=dict(images="embedded"), patch=dict(images="embedded"),
            eqc=dict(images="embedded", sentences="embedded")).get(paper, {})
        if profile == "paper" and paper in ("iac", "patch"): own = dict(images="imagenet")
        specs[profile] = [s for item in items.ITEMS for s in items.grid(item, profile, n_seeds=2, **own)]

    def defaults(s):
        base = {f.name: f.default for f in dataclasses.fields(s)}
        return base | eqc.GAMES[s.game] | PRINTED[s.game] if paper == "eqc" else base
    assert not incomplete(paper, specs, defaults)


def test_a_deviation_is_missed_and_an_old_one_is_found():
    from refcomm.papers.sms.run import SMSSpec
    defaults = lambda s: {f.name: f.default for f in dataclasses.fields(s)}
    found = incomplete("sms", dict(cpu=[SMSSpec(straight_through=False)]), defaults)
    assert any("straight_through differs at cpu" in f for f in found) and any("remove its entry" in f for f in found)


@given(st.floats(.01, 3))
@settings(deadline=None)
def test_near_is_half_of_every_size(share):
    from refcomm.papers.sms.run import SMSSpec
    epochs = max(1, round(30*share))
    assert reach("sms", [SMSSpec(epochs=epochs)])[0] == (epochs >= 15)


def test_a_claim_without_a_value_is_an_error():
    with pytest.raises(ConfigError, match="no value for"): answer("x > y", dict(x=1.))
    assert check_claim(ALL.iloc[0].to_dict(), None)["verdict"] == "untestable here"
    assert all(deviations(p).why.ne("").all() for p in PAPERS)
