"Text that is not the package's own, on the terminal and in figures: brackets, escape sequences, formulas."
import json
import re
import subprocess
import sys
import os

import pandas as pd
import pytest
from hypothesis import given, strategies as st

from refcomm.publish import figures
from refcomm import cli
from refcomm.core import ConfigError, StoreError, printable, progress_bar

HOSTILE = ["[/data/x]", "[bold]a[/bold]", "[red", "a] [b", ":smile:", "\x1b]0;title\x07", "\x1b[2J\x1b[31mred",
    "back\b\rover", "\x9b31m", "\u202eabc", "\udcff.png", "[link=file:///etc]x[/link]"]
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@given(st.text(st.characters(exclude_categories=())))
def test_printable_text_holds_no_control_characters_and_changes_nothing_else(text):
    shown = printable(text)
    assert not CONTROL.search(shown) and isinstance(shown.encode(), bytes) and printable(shown) == shown
    assert shown == text or not text.isprintable()


@pytest.mark.parametrize("text", HOSTILE)
def test_a_table_shows_foreign_text_as_it_is(capsys, text):
    cli.print_table(f"title {text}", (f"column {text}", "b"), [(text, 1)])
    out = capsys.readouterr().out
    assert out.count(printable(text)) == 3 and not CONTROL.search(out)


@pytest.mark.parametrize("text", HOSTILE)
def test_the_final_table_of_a_reproduction_names_a_failure_in_brackets(home, monkeypatch, command, text):
    "Hours of work end in this table."
    monkeypatch.setattr(cli, "reproduce_item",
        lambda item, path, *a: ("failed", path, f"ConfigError: nothing in {text}"))
    r = command("reproduce", "eqc/table1", "--profile", "smoke")
    assert (r.returncode == 1 and f"nothing in {printable(text)}" in " ".join(r.stdout.split())
        and not CONTROL.search(r.stdout + r.stderr))


def test_escape_sequences_of_a_recipe_and_of_a_record_do_not_reach_the_terminal(home, command, small, tmp_path):
    from refcomm.runs.execute import execute
    from refcomm.runs.store import Store
    figures.save("eqc", "table1", pd.DataFrame(dict(a=[1])), figure(), [], "cpu", "eqc Table 1\x1b[2J", "none",
        [dict(id="a", sentence="it \x1b[31mholds", test="a > [b]", numbers={"\x1bk": 1.}, verdict="reproduced",
        cause="\x1b[1mmet", power="")])
    execute([small(epochs=1)])
    (experiment, key), = Store().keys()
    r = Store().read(experiment, key)
    Store().put(small(epochs=1, seed=7), reproduce_result(r), dict(r.provenance, device="cpu [/x] \x1b]0;owned\x07"))
    outs = [command("runs", "list").stdout, command("runs", "show", key).stdout]
    cli.print_comparison("eqc/table1", "cpu")
    assert "[/x]" in outs[0] and not any(CONTROL.search(o) for o in outs)


def reproduce_result(r):
    from refcomm.runs.store import RunResult
    return RunResult(r.rows, r.summary, r.history(), r.tensors())


def test_errors_and_bars_show_foreign_text_safely(capfd, monkeypatch):
    monkeypatch.setenv("REFCOMM_PROGRESS", "text")
    for error in (ConfigError, StoreError): assert str(error("no \x1b[2Jfile [/x]")) == "no \\x1b[2Jfile [/x]"
    with progress_bar(1, "folder: \x1b[2J"): pass
    assert "\x1b[2J" not in "".join(capfd.readouterr())


@pytest.mark.slow
def test_a_terminal_of_few_characters_is_enough(home):
    "Names with letters that the terminal's encoding lacks."
    r = subprocess.run([sys.executable, "-c", "from refcomm.cli import main; main()", "list"], capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert r.returncode == 0 and r.stdout.isascii(), r.stderr


def figure():
    import matplotlib.pyplot as plt
    return plt.figure()


MATH = ["$x_$", r"a\$b$c$ at $5", "$"]


@pytest.mark.parametrize("text", MATH)
def test_a_dollar_is_a_dollar_wherever_it_stands_in_a_figure(home, text):
    import matplotlib.pyplot as plt
    fig, (a, b, c) = plt.subplots(3)
    a.plot([text, "x"], [1, 1000], label=text); a.set_yscale("log"); a.legend(title=text); a.set_xlabel(text)
    b.set_xticks([0, 1], [text, "y"]); b.annotate(text, (0, 0)); b.table([[text]], colLabels=[text])
    figures.curves(pd.DataFrame({text: [1, 2], "y": [1, 2], "line": [text, text]}), text, "y", "line", ax=c)
    fig.suptitle(text)
    png = figures.save("toy", "x", pd.DataFrame({text: [text]}), fig, [], "cpu", text, f"note {text}", data=text)
    assert {p.name for p in png.parent.iterdir()} == {"toy_x.png", "toy_x.csv", "toy_x.json"}
    assert a.get_xticklabels()[0].get_text().replace(r"\$", "$") == text, "what is shown is what was given"
    assert a.get_yticklabels()[0].get_parse_math(), "powers of ten are still drawn as such"
    grid = pd.DataFrame([[1., 2.], [3., 4.]], index=[text, "b"], columns=["a", text])
    for made in (figures.heatmap(grid, text).figure, figures.draw_table(grid, text)): made.canvas.draw()
    plt.close("all")


def test_png_csv_and_json_appear_together_or_not_at_all(home, tmp_path, monkeypatch):
    import matplotlib.pyplot as plt
    from refcomm.files import figures_dir
    numbers = pd.DataFrame(dict(a=[1]))
    state = lambda: {p.name: p.read_bytes() if p.is_file() else None for p in figures_dir("cpu").glob("*")}
    class Broken:
        def __str__(self): raise RuntimeError("no text")
    def savefig(*a, **k): raise RuntimeError("cannot draw")
    def attempts():
        yield dict(numbers=pd.DataFrame(dict(a=[Broken()]))), RuntimeError
        yield dict(claims=[dict(verdict={1, 2})]), (TypeError, ConfigError)
        yield dict(claims=[dict(verdict="\udcff")]), (UnicodeEncodeError, ConfigError)
        fig = plt.figure(); monkeypatch.setattr(fig, "savefig", savefig)
        yield dict(figure=fig), RuntimeError
    def save(**how):
        return figures.save(**{**dict(paper="toy", item="x", numbers=numbers, figure=plt.figure(), records=[],
            profile="cpu", title="t", note="n"), **how})
    for how, error in attempts():
        with pytest.raises(error): save(**how)
        assert not state()
    save()
    before = state()
    assert len(before) == 3
    for how, error in attempts():
        with pytest.raises(error): save(**how)
        assert state() == before, "the three of the last time remain"
    for end in (".png", ".csv", ".json"):
        (figures_dir("cpu")/f"toy_y{end}").mkdir()
        with pytest.raises(StoreError): save(item="y")
        assert [p.name for p in figures_dir("cpu").glob("*toy_y*")] == [f"toy_y{end}"]
        (figures_dir("cpu")/f"toy_y{end}").rmdir()


def test_a_recipe_nested_too_deep_is_one_error(tmp_path):
    (tmp_path/"a.json").write_text("["*100_000)
    with pytest.raises(ConfigError, match="no readable recipe"): figures.load_recipe(tmp_path/"a.png")
    (tmp_path/"a.json").write_bytes(json.dumps({"a": "é"}).encode("latin1").replace(b"\\u00e9", b"\xe9"))
    with pytest.raises(ConfigError, match="no readable recipe"): figures.load_recipe(tmp_path/"a.png")


def test_a_recipe_that_was_changed_after_it_was_written_is_named(home, tmp_path):
    from refcomm.publish.report import read_items
    from refcomm.runs.costs import shipped
    png = figures.save("toy", "x", pd.DataFrame(dict(a=[1])), figure(), [], "cpu", "a title", "a note")
    recipe = png.with_suffix(".json")
    written, kept = json.loads(recipe.read_text("utf-8")), recipe.read_text("utf-8")
    assert figures.load_recipe(png) == {k: v for k, v in written.items() if k != "sha256"}
    recipe.write_text(json.dumps(written, sort_keys=True), encoding="utf-8")
    assert figures.load_recipe(png)["title"] == "a title", "another order of names says the same"
    recipe.write_text(kept.replace("a note", "a nose"), encoding="utf-8")
    with pytest.raises(ConfigError, match="it does not hold what was written"): figures.load_recipe(png)
    items, problems = read_items(png.parent)
    assert not items and "toy_x" in problems[0] and "does not hold what was written" in problems[0]
    with pytest.warns(UserWarning, match="is no recipe of a figure"): assert shipped(png.parent) == {}
    recipe.write_text(json.dumps(written | dict(note="mine", sha256="edited")), encoding="utf-8")
    assert figures.load_recipe(png)["note"] == "mine", "who edits it on purpose says so"
    without = {k: v for k, v in written.items() if k != "sha256"}
    lost = kept[:kept.index("a note")] + "a no" + kept[kept.index('"sha256"') + 20:] # bytes lost, also of the checksum
    for text in (json.dumps(without), lost):
        recipe.write_text(text, encoding="utf-8")
        assert isinstance(json.loads(text), dict)
        with pytest.raises(ConfigError, match="no sha256"): figures.load_recipe(png)
