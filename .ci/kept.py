"""Show each paper notebook's kept figure below its title, and copy the words of the tables of claims into the recipes.   usage: python .ci/kept.py"""
import json
from pathlib import Path

from refcomm.papers.claims import claims
from refcomm.publish.figures import load_recipe
from refcomm.runs.store import sealed

ROOT = Path(__file__).resolve().parents[1]
ID = "kept-figure"


def origin(recipe): # "commit 047239b31c · cpu (x86_64, 1 threads) · …", without the number of runs
    return recipe["runs"].split(" · ", 1)[-1]


def cell(recipe, depth):
    "The generated markdown cell of one item."
    figure = f"{'../'*depth}figures/{recipe['paper']}_{recipe['item']}"
    seeds = ", ".join(map(str, recipe["seeds"])) or "none"
    source = [
        f"![{recipe['title']}]({figure}.png)", "",
        f"*Kept result: profile `{recipe['profile']}` · data: {recipe['data']} · seeds {seeds} · {origin(recipe)}. "
        f"Numbers: [{Path(figure).name}.csv]({figure}.csv); everything else: [{Path(figure).name}.json]({figure}.json).*",
        "",
        "```sh", recipe["command"], "```"]
    return dict(cell_type="markdown", id=ID, metadata={}, source=[line + "\n" for line in source[:-1]] + source[-1:])


def update(path):
    "Insert, replace or remove the cell; True if the notebook changed."
    nb, recipe = json.loads(path.read_text(encoding="utf-8")), ROOT/"figures"/f"{path.parent.name}_{path.stem}.json"
    cells = [c for c in nb["cells"] if c.get("id") != ID]
    if recipe.is_file():
        cells.insert(1, cell(json.loads(recipe.read_text(encoding="utf-8")), len(path.relative_to(ROOT).parts) - 1))
    if cells == nb["cells"]: return False
    path.write_text(json.dumps(dict(nb, cells=cells), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return True


def worded(recipe, table):
    "A recipe whose claims have the words of the table, where the test is the same."
    for c in recipe["claims"]:
        if c["id"] not in table.index or c["test"] != table.test[c["id"]]: continue
        row = table.loc[c["id"]]
        c |= dict(game=row.game, sentence=row.sentence, source=row.source)
        if c.get("explanation"):
            c["cause"] = c["cause"].replace(c["explanation"].rstrip("."), row.explanation.rstrip("."))
            c["explanation"] = row.explanation
    return recipe


def reword(path, tables):
    "Update the words of a kept recipe; numbers and verdicts stay."
    recipe = load_recipe(path)
    if recipe["paper"] not in tables: return
    text = json.dumps(sealed(worded(recipe, tables[recipe["paper"]])), indent=1, ensure_ascii=False) + "\n"
    if text != path.read_text(encoding="utf-8"): path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    tables = {p: claims(p).set_index("id") for p in ("eqc", "iac", "patch", "sms", "beyond")}
    for path in sorted((ROOT/"figures").glob("*.json")): reword(path, tables)
    for folder in ("papers", "benchmarks"):
        for path in sorted((ROOT/"nbs"/folder).rglob("*.ipynb")): update(path)
