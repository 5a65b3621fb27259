"""Sphinx settings of the documentation; build.py writes the pages that they are for."""
from latex2mathml.converter import convert

import refcomm

project, author, copyright = "refcomm", "The refcomm authors", "2026 onwards, the refcomm authors"
version = release = refcomm.__version__
extensions = ["myst_nb"]
nb_execution_mode, nb_render_markdown_format = "off", "myst"
myst_enable_extensions = ["dollarmath"]
html_theme, html_title, html_static_path, html_css_files = "furo", "refcomm", ["static"], ["style.css"]
html_show_sourcelink = html_copy_source = html_use_index = False
html_math_renderer = "mathml"


def _formula(translator, node, display):
    from docutils.nodes import SkipNode
    translator.body.append(convert(node.astext(), display=display))
    raise SkipNode


def setup(app): # formulas are MathML: no script of another host's
    app.add_html_math_renderer("mathml", (lambda t, n: _formula(t, n, "inline"), None),
        (lambda t, n: _formula(t, n, "block"), None))
