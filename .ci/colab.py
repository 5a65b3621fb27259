"""Give each paper notebook and tutorial the links to open it elsewhere, and the cell that installs refcomm there.   usage: python .ci/colab.py"""
import configparser
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINKS, INSTALL = "open-elsewhere", "install-refcomm"
PYTHON = """#| hide
try: import refcomm
except ImportError: # on Colab or Kaggle; PyTorch stays as it is
    import torch
    %pip install -q git+{git_url} torch=={{torch.__version__}}"""


def settings():
    read = configparser.ConfigParser(interpolation=None)
    read.read(ROOT/"settings.ini")
    return read["DEFAULT"]


def cells(path, s):
    "The generated cells of one notebook."
    file = f"{s['git_url']}/blob/{s['branch']}/{path.relative_to(ROOT).as_posix()}"
    colab = file.replace("https://github.com/", "https://colab.research.google.com/github/")
    links = f"[Open in Colab]({colab}) · [open in Kaggle](https://kaggle.com/kernels/welcome?src={file})"
    return [dict(cell_type="markdown", id=LINKS, metadata={}, source=[links]),
        dict(cell_type="code", execution_count=None, id=INSTALL, metadata={}, outputs=[],
            source=PYTHON.format(git_url=s["git_url"]).splitlines(keepends=True))]


def update(path, s):
    "Put the cells before the first code cell; True if the notebook changed."
    nb = json.loads(path.read_text(encoding="utf-8"))
    own = [c for c in nb["cells"] if c.get("id") not in (LINKS, INSTALL)]
    first = next(i for i, c in enumerate(own) if c["cell_type"] == "code")
    made = own[:first] + cells(path, s) + own[first:]
    if made == nb["cells"]: return False
    path.write_text(json.dumps(dict(nb, cells=made), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return True


if __name__ == "__main__":
    for folder in ("papers", "tutorials"):
        for path in sorted((ROOT/"nbs"/folder).rglob("*.ipynb")): update(path, settings())
