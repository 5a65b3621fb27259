"""Write README.md from nbs/index.ipynb, and figures/README.md from the recipes there.   usage: python .ci/readme.py"""
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

ROOT = Path(__file__).resolve().parents[1]
TAGS = Config(TagRemovePreprocessor=dict(enabled=True, remove_input_tags=["hide-input"],
    remove_cell_tags=["hide-cell"]))


def readme(): # markdown
    nb = nbformat.read(ROOT/"nbs"/"index.ipynb", as_version=4)
    nb.metadata["language_info"] = dict(name="python")
    return MarkdownExporter(config=TAGS).from_notebook_node(nb)[0].replace("](../", "](")


def results(): # markdown
    from refcomm.publish.report import read_items
    from refcomm.publish.results import results_page
    items, problems = read_items(ROOT/"figures")
    if problems: raise SystemExit("\n".join(problems))
    return results_page(items)


if __name__ == "__main__":
    (ROOT/"README.md").write_text(readme().strip() + "\n", encoding="utf-8")
    (ROOT/"figures"/"README.md").write_text(results(), encoding="utf-8")
