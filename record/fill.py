"""Templates: the tables of templates/*.md and the page of view/page.html, filled by Jinja2. What is
put in is escaped for HTML, which Markdown is too, unless it is Markup."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

HERE = Path(__file__).parent
ENVIRONMENT = Environment(
    loader=FileSystemLoader([HERE / "templates", HERE / "view"]),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.policies["json.dumps_kwargs"] = dict(separators=(",", ":"), allow_nan=False)


def signed(value: float, digits: int) -> str:
    """1.5 -> +1.50, -1.5 -> −1.50, with a true minus."""
    return ("+" if value >= 0 else "\N{MINUS SIGN}") + f"{abs(value):.{digits}f}"


ENVIRONMENT.filters["signed"] = signed


def fill(template: str, **values) -> str:
    """The template's text with `values`; every name in it must be among them. In Markdown ' and >
    stay as they are: without < they do nothing, and people read it unrendered too."""
    text = ENVIRONMENT.get_template(template).render(values)
    return text.replace("&#39;", "'").replace("&gt;", ">") if template.endswith(".md") else text
