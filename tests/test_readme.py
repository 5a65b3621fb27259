"What README, tutorials, notebooks and pages tell readers to type: Python blocks run alone, commands and options exist."
import json
import re
import shlex
import tomllib

import pytest

from conftest import ROOT
from refcomm.core import ConfigError
from refcomm.publish.catalogue import choose, notebooks, parameters_of

PAGES = [*ROOT.glob("*.md"), ROOT/"figures"/"README.md", *(ROOT/"nbs").glob("*.md")]
NOTEBOOKS = [p for p in (ROOT/"nbs").rglob("*.ipynb") if not any(part.startswith((".", "_")) for part in p.parts)]
FENCED = re.compile(r"^ *```(\w*)[^\n]*\n(.*?)^ *```", re.M | re.S)


def markdown(path):
    "The text of a page, or of the markdown cells of a notebook."
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md": return text
    return "\n\n".join("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "markdown")


def name(path): return path.relative_to(ROOT).as_posix()


TEXTS = {name(p): markdown(p) for p in PAGES + NOTEBOOKS}
BLOCKS = [(f"{page}:{i}", language, body) for page, text in TEXTS.items() for i, (language, body) in
    enumerate(FENCED.findall(text))]
PYTHON = {where: body for where, language, body in BLOCKS if language == "python"}
COMMANDS = sorted({line.split("#")[0].strip() for _, language, body in BLOCKS if language == "sh"
    for line in body.splitlines()} | {code for text in TEXTS.values()
    for code in re.findall(r"`((?:refcomm|make) [a-z][^`\n]*)`",
        text)} - {""})


@pytest.mark.slow
@pytest.mark.parametrize("where", PYTHON)
def test_a_block_runs_alone(where, home, capsys):
    exec(compile(PYTHON[where], where, "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip(), "a reader sees what came out"


def test_the_readme_has_blocks_to_run():
    assert len([w for w in PYTHON if w.startswith("README.md:")]) >= 2 and len(COMMANDS) > 10
    languages = {language for page, language, _ in BLOCKS}
    assert languages <= {"python", "sh", "", "bibtex", "toml", "json", "text"}, "a block of Python is marked `python`"


def leaf(words):
    "The command that the words call, what remains of them, and the words up to there."
    import typer
    from refcomm.cli import app
    command, path = typer.main.get_command(app), []
    while words and hasattr(command, "commands"):
        assert words[0] in command.commands, f"no command {' '.join([*path, words[0]])}"
        path, command, words = [*path, words[0]], command.commands[words[0]], words[1:]
    return command, words, path


def check_refcomm(words):
    command, words, path = leaf(words)
    options = ({o: p for p in command.params for o in (*p.opts, *p.secondary_opts) if o.startswith("-")}
        | {"--help": None})
    items, values = [], []
    while words:
        word, *words = words
        if not word.startswith("-"): items.append(word); continue
        option, _, value = word.partition("=")
        assert option in options, f"refcomm {' '.join(path)} has no option {option}"
        if options[option] is not None and not getattr(options[option], "is_flag", False) and not value:
            value, *words = words
        if option == "-p": values.append(value.split("=")[0])
    if path[0] not in ("reproduce", "plan", "redraw"): return
    try: chosen = choose([i for i in items if "{" not in i and "ITEM" not in i])
    except ConfigError as e: raise AssertionError(str(e)) from None
    for v in values: assert any(v in parameters_of(notebooks()[i]) for i in chosen), f"no parameter {v}"


def check_make(words):
    targets = re.findall(r"^([\w-]+):", (ROOT/"Makefile").read_text(), re.M)
    assert all(w in targets for w in words if "=" not in w), f"no target among {words}"


def check_pip(words):
    extras = tomllib.loads((ROOT/"pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert words[0] == "install"
    for found in re.findall(r"\[([\w,-]+)\]", " ".join(words)):
        for extra in found.split(","): assert extra in extras, f"no extra {extra}"


CHECKS = dict(refcomm=check_refcomm, make=check_make, pip=check_pip)


@pytest.mark.parametrize("tool", CHECKS)
def test_commands_exist(tool):
    wrong = {}
    for command in COMMANDS:
        words = shlex.split(command)
        while words and "=" in words[0]: words = words[1:]
        if not words or words[0] != tool: continue
        try: CHECKS[tool](words[1:])
        except AssertionError as e: wrong[command] = str(e).splitlines()[0]
    assert not wrong, wrong


def test_other_commands_are_few():
    "A command of another program is named here, so that nobody types what does not exist."
    first = {next(w for w in shlex.split(c) if "=" not in w) for c in COMMANDS}
    assert first <= {*CHECKS, "python", "jupyter", "papermill", "conda", "git", "export", "sbatch", "torchrun", "ray",
        "cd"}, first


@pytest.mark.parametrize("command, says", [("make quikc", "no target"), ("refcomm reproduse", "no command"),
    ("refcomm reproduce eqc --executer slurm", "no option"),
    ("refcomm reproduce eqc/table5 -p n_seedz=2", "no parameter"),
    ("refcomm reproduce eqc/table99", "table99"), ("pip install '.[baseline]'", "no extra")])
def test_a_command_that_does_not_exist_is_found(command, says):
    tool, *words = shlex.split(command)
    with pytest.raises(AssertionError, match=says): CHECKS[tool](words)


ELSEWHERE = [p for p in NOTEBOOKS if p.parts[len(ROOT.parts) + 1] in ("papers", "tutorials")]


def test_notebooks_open_elsewhere_from_their_first_cells():
    "The cell that installs is the first of the code, and the same everywhere; links lead to the notebook's own file."
    sources = set()
    for p in ELSEWHERE:
        cells = json.loads(p.read_text(encoding="utf-8"))["cells"]
        first = next(i for i, c in enumerate(cells) if c["cell_type"] == "code")
        assert [c["id"] for c in cells[first - 1:first + 1]] == ["open-elsewhere", "install-refcomm"], name(p)
        assert "".join(cells[first - 1]["source"]).count(f"/blob/main/{name(p)})") == 2, name(p)
        sources.add("".join(cells[first]["source"]))
    assert len(ELSEWHERE) > 60 and len(sources) == 1


@pytest.mark.parametrize("there", [True, False])
def test_an_installation_leaves_torch_as_it_is(there, monkeypatch):
    import sys

    import torch
    from IPython.core.interactiveshell import InteractiveShell
    from packaging.requirements import Requirement
    cells = json.loads(ELSEWHERE[0].read_text(encoding="utf-8"))["cells"]
    source, asked = "".join(next(c for c in cells if c["id"] == "install-refcomm")["source"]), []
    if not there: monkeypatch.setitem(sys.modules, "refcomm", None)
    shell = InteractiveShell()
    shell.register_magic_function(asked.append, magic_name="pip")
    shell.run_cell(source).raise_error()
    assert len(asked) == (not there)
    if there: return
    line, = asked
    command, quiet, url, pinned = line.split()
    assert (command, quiet) == ("install", "-q") and url.startswith("git+https://")
    assert Requirement(pinned).name == "torch" and Requirement(pinned).specifier.contains(torch.__version__,
        prereleases=True)
