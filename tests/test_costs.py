"What a plan says that trainings will cost, held against what they did cost."
import dataclasses
import json
import math
import shlex

import pytest
import torch

from refcomm.papers.counts import IMAGES, Model, count, counted, shape_of, trains
from refcomm.papers.eqc.items import configure
from refcomm.papers.eqc.spec import SOURCES
from refcomm.publish.catalogue import item_runs, notebooks, parameters_of, parse_parameters
from refcomm.runs.costs import SPEEDS, Speed, shipped
from refcomm.runs.execute import make_stacks

HERE = Speed("cpu, 1 thread", 58e9, 58e9, 29e9, 29e9, 8e9, 15e-6, 1.7, False, 2.)  # of a core of the machine that made the figures


def made(recipe, monkeypatch):
    "The Specs of a figure, with the data that it was made with."
    words = shlex.split(recipe["command"])
    given = parse_parameters([words[i + 1] for i, w in enumerate(words) if w == "-p"])
    real = [*IMAGES, *(s["real"][0] for s in SOURCES.values())] if "rendered" not in recipe["data"] else []
    monkeypatch.setenv("REFCOMM_STAMPS", json.dumps(dict.fromkeys(real, "00000000")))
    item = f"{recipe['paper']}/{recipe['item']}"
    return item_runs(item, {**parameters_of(notebooks()[item]), "n_seeds": len(recipe["seeds"]), **given, "profile": recipe["profile"]})


def test_estimates_are_near_what_was_recorded(shipped_figures, monkeypatch, home):
    "Seconds of an epoch, by counting, are within a factor of two of those of the shipped figures, for four items of five."
    monkeypatch.delenv("REFCOMM_DATA", raising=False)
    ratios = {}
    for item, recipe in shipped(shipped_figures).items():
        if not recipe.get("costs", {}).get("runs") or not (specs := made(recipe, monkeypatch)): continue
        specs = [s for s in dict.fromkeys(specs) if trains(s)]
        model = Model(specs, HERE)
        seconds = sum(model(s).seconds for s in specs)/sum(s.epochs for s in specs)
        ratios[item] = seconds/(recipe["costs"]["seconds"]/recipe["costs"]["epochs"])
    near = {i for i, r in ratios.items() if .5 <= r <= 2}
    assert len(ratios) >= 40 and len(near) >= .8*len(ratios), {i: round(r, 2) for i, r in sorted(ratios.items()) if i not in near}
