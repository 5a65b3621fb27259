"""Build the documentation: nbdev processes the notebooks, Sphinx makes pages of them, and every link between pages is followed.

usage: python .ci/docs/build.py [FOLDER]      (by default _docs; the pages are in FOLDER/html)
"""
import ast, functools, json, os, re, shutil, sys
from importlib import import_module
from pathlib import Path

from fastcore.docments import DocmentText
from nbdev import serve
from nbdev.processors import FilterDefaults, add_links, add_show_docs, clean_show_doc, exec_show_docs, insert_warning, rm_export
from nbdev.frontmatter import FrontmatterProc
from nbdev.process import Processor

ROOT = Path(__file__).resolve().parents[2]
ROOMS = { # number of the first notebook → what they are about
    0: "Foundations", 10: "Data", 22: "Bottlenecks and channels", 30: "Agents", 38: "Games", 45: "Settings of the papers' runs", 50: "Metrics",
    58: "Symbolic complexity",
    64: "Training", 68: "Runs, corpora and play", 80: "Papers", 93: "Publishing and the command line",
}
_DEFS = (ast.FunctionDef, ast.ClassDef)


def _public(node): return isinstance(node, _DEFS) and node.name[0] != "_"

def _entry(module, name): # kind, signature with docments, docstring
    found = module
    for part in name.split("."): found = getattr(found, part)
    if isinstance(found, (property, functools.cached_property)): return "property", "", found.__doc__
    kind = "class" if isinstance(found, type) else "def"
    signature = str(DocmentText(found, maxline=110, docstring=False))
    if kind == "class": signature = re.sub(r"\)(->None)?:$", ")", signature)
    return kind, re.sub(r"^def \w+", f"{kind} {name}", signature), found.__doc__


class Documented(Processor):
    "Collect what a notebook exports: names, signatures with docments, docstrings."
    def begin(self):
        exported = next((c.directives_["default_exp"][0] for c in self.nb.cells if "default_exp" in c.directives_),
            None)
        if not exported: return
        module = import_module(f"refcomm.{exported}")
        nodes = [(n, c.source) for c in self.nb.cells if "export" in c.directives_ for n in ast.parse(c.source).body]
        self.classes = {n.name: n for n, _ in nodes if isinstance(n, ast.ClassDef)}
        docs = [entry for node, source in nodes for entry in self.entries(module, node, source)]
        self.nb.metadata["refcomm"] = dict(module=exported, docs=docs)

    def methods(self, node)->list: # names of documented methods, those of private bases first
        inherited = [name for b in node.bases if isinstance(b, ast.Name) and b.id[0] == "_" and b.id in self.classes
            for name in self.methods(self.classes[b.id])]
        return inherited + [m.name for m in node.body if _public(m) and ast.get_docstring(m)]

    def entries(self, module, node, source): # of a function, of a class and its documented methods, or of values
        if _public(node):
            methods = dict.fromkeys(self.methods(node) if isinstance(node, ast.ClassDef) else [])
            return [(n, *_entry(module, n)) for n in (node.name, *(f"{node.name}.{m}" for m in methods))]
        names = ast.walk(node.targets[0]) if isinstance(node, ast.Assign) else ()
        return [(n.id, "value", ast.get_source_segment(source, node), None) for n in names if isinstance(n, ast.Name)
            and n.id[0] != "_"]


def without_hidden(cell):
    "Drop hidden cells and those that only name the module; exported code is the lesson, and stays."
    if {"hide", "default_exp"} & set(cell.directives_ or ()): del cell["source"]


class Lesson(FilterDefaults):
    "nbdev's processing, for a site where the code is to be read and the API has pages of its own."
    def base_procs(self):
        instead = {add_show_docs: Documented, rm_export: without_hidden}
        skipped = (FrontmatterProc, insert_warning, clean_show_doc, exec_show_docs, add_links)
        return [instead.get(p, p) for p in super().base_procs() if p not in skipped]


def process()->dict: # path below nbs, without its end → processed notebook
    "Process every notebook; those that have not changed are found done."
    serve.FilterDefaults = Lesson
    done = ROOT/"_proc"
    stale = max(p.stat().st_mtime for p in [Path(__file__), *(ROOT/"refcomm").rglob("*.py")])
    cache = serve.proc_nbs("nbs", n_workers=2, force=done.exists() and done.stat().st_mtime < stale)
    names = sorted(p.relative_to("nbs") for p in Path("nbs").rglob("*.ipynb") if p.parent.name[0] not in "._"
        and p.name[0] not in "._")
    return {str(n.with_suffix("")): json.loads((cache/n).read_text()) for n in names}


def text(cell): return "".join(cell["source"])
def markdown(source, name): return dict(cell_type="markdown", metadata={}, source=source, id=name)
def anchor(module, name, kind): return f"{'class' if kind == 'class' else 'def'}-{module}.{name}".lower()
def cut(sentence): return sentence.replace("|", r"\|")
def title(nb): return text(nb["cells"][0]).splitlines()[0].lstrip("# ")

def summary(nb): # the quoted line below the heading
    return next((l[2:] for l in text(nb["cells"][0]).splitlines() if l.startswith("> ")), "")


class Links:
    "Names in backticks become links to the API, paths of notebooks to their pages."
    def __init__(self, notebooks):
        self.modules, self.pages = {}, set(notebooks)
        for nb in notebooks.values():
            if api := nb["metadata"].get("refcomm"):
                self.modules[api["module"]] = {name: kind for name, kind, _, _ in api["docs"]}

    def target(self, name, here): # "#…", or None where the name is none of the library's, or of several modules
        if name in self.modules.get(here, ()): return f"#{anchor(here, name, self.modules[here][name])}"
        if name.removeprefix("refcomm.") in self.modules:
            return f"/api/{name.removeprefix('refcomm.')}.md" if name.startswith("refcomm.") else None
        homes = [m for m, names in self.modules.items() if name in names]
        telling = name != name.lower() or "_" in name # a plain word may mean something else
        return f"#{anchor(homes[0], name, self.modules[homes[0]][name])}" if len(homes) == 1 and telling else None

    def replace(self, match, here):
        name = match[1]
        if page := re.fullmatch(r"nbs/(.+)\.ipynb", name):
            to = f"/{place(page[1])}.ipynb" if page[1] in self.pages else None
        else: to = self.target(name.removesuffix("()"), here)
        return f"[`{name}`]({to})" if to else match[0]

    def __call__(self, source, here):
        parts = re.split(r"(^```.*?^```|^#.*?$)", source, flags=re.S | re.M) # fenced code and headings stay as they are
        return "".join(p if i % 2 else re.sub(r"(?<![\[`])`([^`\s]+)`(?![\]`])", lambda m: self.replace(m, here), p)
            for i, p in enumerate(parts))


def place(name): # of a notebook's page, without its end
    folder, _, stem = name.rpartition("/")
    if name == "index": return "index"
    if not folder: return f"lessons/{stem}"
    return f"{folder}/{stem}" if folder.startswith(("papers/", "tutorials")) else f"papers/{folder}/{stem}"


def tree(names, hidden=True):
    return "\n".join(["```{toctree}", ":maxdepth: 1", *([":hidden:"] if hidden else []), "", *names, "```"])


class Site:
    "The source that Sphinx reads."
    def __init__(self, folder):
        self.folder, self.kept, self.notebooks = folder, set(), process()
        self.links = Links(self.notebooks)

    def put(self, name, content):
        path = self.folder/name
        self.kept.add(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_text() != content: path.write_text(content)

    def notebook(self, name, cells=None):
        "A notebook's page, with links."
        nb, here = self.notebooks[name], self.notebooks[name]["metadata"].get("refcomm", {}).get("module")
        cells = [dict(c, source=self.links(text(c), here)) if c["cell_type"] == "markdown" else c
            for c in (cells or nb["cells"]) if c.get("id") != "kept-figure"]
        self.put(f"{place(name)}.ipynb", json.dumps(dict(nb, metadata={"kernelspec": nb["metadata"]["kernelspec"]},
            cells=cells), ensure_ascii=False))

    def home(self):
        "The README, without its tables of results: they are under Papers."
        cells, keep = [], True
        for c in self.notebooks["index"]["cells"]:
            if text(c).startswith("#"): keep = not text(c).startswith("## Results")
            if keep and "hide-cell" not in c["metadata"].get("tags", ()): cells.append(c)
        cells = [dict(c, source=text(c).replace("](../figures/README.md)", "](papers/index.md)").replace("](../figures/", "](/figures/")) for c in cells]
        links = ("[Lessons](lessons/index.md) · [Papers](papers/index.md) · [Build your own game](tutorials/index.md) · "
            "[API](api/index.md) · [Glossary](glossary.md) · [Speed](speed.md) · [GPUs](gpu.md) · [Security](security.md)")
        pages = tree(["lessons/index", "papers/index", "tutorials/index", "api/index", "glossary", "speed", "gpu", "security"])
        self.notebook("index", [cells[0], markdown(links, "links"), *cells[1:], markdown(pages, "pages")])

    def lessons(self):
        stems = [n for n in self.notebooks if n[0].isdigit() and "/" not in n]
        lines = ["# Lessons", "", "Each module is exported from a notebook that explains it, shows it and tests it."]
        pages = []
        number = lambda stem: int(stem.split("_")[0])
        for room, after in zip(ROOMS, [*list(ROOMS)[1:], 1000]):
            own = [s for s in stems if room <= number(s) < after]
            for s in own: self.lesson(s, self.notebooks[s])
            listed = [f"- [{title(self.notebooks[s])}]({s}.ipynb): {summary(self.notebooks[s])}" for s in own]
            lines += ["", f"## {ROOMS[room]}", "", *listed]
            pages.append(re.sub(r"\W+", "-", ROOMS[room].lower()))
            self.put(f"lessons/{pages[-1]}.md", "\n".join([f"# {ROOMS[room]}", "", *listed, "", tree(own)]))
        self.put("lessons/index.md", "\n".join([*lines, "", tree(pages)]))

    def lesson(self, name, nb):
        module = nb["metadata"]["refcomm"]["module"]
        self.notebook(name, [nb["cells"][0],
            markdown(f"In short: [the API of refcomm.{module}](/api/{module}.md).", "api"), *nb["cells"][1:]])

    def tutorials(self):
        names = [n for n in self.notebooks if n.startswith("tutorials/")]
        lines = ["# Build your own game", "",
            "Short notebooks, each of which ends with something that the library does not have. They run in seconds on a laptop."]
        for n in names:
            self.notebook(n)
            lines.append(f"\n- [{title(self.notebooks[n])}]({Path(n).name}.ipynb): {summary(self.notebooks[n])}")
        self.put("tutorials/index.md", "\n".join([*lines, "", tree([Path(n).name for n in names])]))

    def api(self):
        modules = {nb["metadata"]["refcomm"]["module"]: (name, nb) for name, nb in self.notebooks.items()
            if "refcomm" in nb["metadata"]}
        lines = ["# API", "", "Every module, function and class, with what its parameters mean.", ""]
        for module, (name, nb) in modules.items():
            page = [f"# refcomm.{module}", "", summary(nb), "", f"How it works: [the lesson](/{place(name)}.ipynb)."]
            for what, kind, signature, doc in nb["metadata"]["refcomm"]["docs"]:
                page += ["", f"({anchor(module, what, kind)})=", f"{'###' if '.' in what else '##'} {what}", "",
                    *(["```python", signature, "```", ""] if signature else []), self.links(doc or "", module)]
            self.put(f"api/{module}.md", "\n".join(page))
            lines.append(f"- [refcomm.{module}]({module}.md): {summary(nb)}")
        self.put("api/index.md", "\n".join([*lines, "", tree(modules)]))

    def papers(self):
        "Each paper's items: the figure that is kept, what made it, the claims it decides, and the notebook."
        from refcomm.publish.report import read_items, sections, tally
        items, problems = read_items(ROOT/"figures")
        if problems: raise SystemExit("\n".join(problems))
        known = {place(n).removeprefix("papers/"): n for n in self.notebooks if place(n).startswith("papers/")}
        parts = sections(items, {k: title(self.notebooks[n]) for k, n in known.items()})
        lines = ["# Papers", "",
            "What the papers show, made again. Numbers are from the committed runs; what differs from the paper is said beside each."]
        for s in parts:
            counts = tally(s["claims"])
            lines += ["",
                f"- [{s['name']}]({s['paper']}/index.md): "
                f"{f'{len(made)} tables and figures' if (made := s['items']) else 'nothing is kept yet'}"
                + (f", {counts['reproduced']} of {sum(counts.values())} claims reproduced" if sum(counts.values())
                else "")]
            self.paper(s, known)
        self.put("papers/index.md", "\n".join([*lines, "", tree([f"{s['paper']}/index" for s in parts])]))

    def paper(self, s, known):
        page, made = [f"# {s['name']}"], [i for i in s["items"] if i["name"] in known]
        for i in made:
            self.notebook(known[i["name"]], self.item(i, self.notebooks[known[i["name"]]]["cells"]))
            page += ["", f"## [{i['heading']}]({i['item']}.ipynb)", "",
                f"[![{cut(i['heading'])}](/figures/{i['paper']}_{i['item']}.png)]({i['item']}.ipynb)"]
        rest = [i for i in s["missing"] if f"{s['paper']}/{i['item']}" in known]
        for i in rest: self.notebook(known[f"{s['paper']}/{i['item']}"])
        if s["missing"]:
            page += ["", "## Not kept yet", "",
                *(f"- {m['title']}" + (f": `{m['command']}`" if m["command"] else "") for m in s["missing"])]
        if s["drawings"]: page += ["", f"Drawings, of which nothing is to be made again: {', '.join(s['drawings'])}."]
        self.put(f"papers/{s['paper']}/index.md", "\n".join([*page, "", tree([i["item"] for i in made + rest])]))

    def item(self, i, cells):
        "The notebook with its figure after the first cell."
        stem = f"{i['paper']}_{i['item']}"
        claims = (["| claim | verdict | cause | power |", "|---|---|---|---|",
            *(f"| {cut(c['sentence'])} | {c['verdict']} | {cut(c['cause'])} | {c['power']} |" for c in i["claims"])]
            if i["claims"] else [])
        made = [f"Made at profile *{i['profile']}* from {i['data']}. {i['runs'][:1].upper()}{i['runs'][1:]}", "",
            i["note"], "", "```sh", i["command"], "```", "",
            f"The numbers: {{download}}`{stem}.csv </figures/{stem}.csv>`."]
        beside = (["## Paper beside ours", "", "| | | published | ours | difference |", "|---|---|--:|--:|--:|"]
            if i["beside"] else [])
        for t in (i["beside"] or {}).get("tables", ()):
            value = lambda line, k: f"{line[k]} ± {line[f'{k}_sd']}" if line[f"{k}_sd"] else line[k]
            beside += [f"| {cut(t['row'])} | {cut(line['column'])} | {value(line, 'published')} | "
                f"{value(line, 'ours')} | {line['difference']}{' ★' if line['off'] else ''} |" for line in t["lines"]]
        if beside: beside += ["", "★ the 95 % interval of the difference leaves out 0.", ""]
        shown = ["## The result that is kept", "", f"![{cut(i['heading'])}](/figures/{stem}.png)", "", *made, "",
            *claims, "", *beside, "## The notebook"]
        return [cells[0], markdown("\n".join(shown), "kept"), *cells[1:]]

    def write(self):
        for p in sorted((ROOT/"figures").glob("*_*.*")):
            self.kept.add(self.folder/"figures"/p.name)
            (self.folder/"figures").mkdir(parents=True, exist_ok=True)
            shutil.copy2(p, self.folder/"figures"/p.name)
        self.home(); self.lessons(); self.papers(); self.tutorials(); self.api()
        for name in ("speed", "gpu", "glossary"):
            self.put(f"{name}.md", self.links((ROOT/"nbs"/f"{name}.md").read_text("utf-8"), None))
        self.put("security.md", (ROOT/"SECURITY.md").read_text("utf-8"))
        for p in self.folder.rglob("*"):
            if p.is_file() and p not in self.kept: p.unlink()


def main(folder):
    from sphinx.cmd.build import main as sphinx
    from links import broken
    folder = Path(folder).absolute()
    os.chdir(ROOT)
    Site(folder/"source").write()
    if code := sphinx(["-b", "html", "-W", "--keep-going", "-q", "-c", str(Path(__file__).parent), "-d",
        str(folder/"doctrees"), str(folder/"source"), str(folder/"html")]):
        return code
    if wrong := broken(folder/"html"): print(*wrong, sep="\n", file=sys.stderr)
    else: print(f"open {folder/'html'/'index.html'}")
    return bool(wrong)


if __name__ == "__main__": sys.exit(main(*(sys.argv[1:] or [ROOT/"_docs"])))
