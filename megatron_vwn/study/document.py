"""A document of headings, text, tables, lists and plots, as Markdown and as one HTML file that needs no network."""

import base64
import html
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Heading:
    """A line above a section; level 1 is the title."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Items:
    """A list."""

    items: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """Columns with a head; the first is text, the others are numbers."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Plot:
    """An image beside the document, NAME.png and NAME.svg."""

    name: str
    caption: str


@dataclass(frozen=True)
class Code:
    """Lines to be copied."""

    text: str


Block = Heading | Text | Items | Table | Plot | Code
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 66rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; margin-top: 2rem; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; font-size: 0.9rem; }
th, td { padding: 0.3rem 0.7rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th { white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
tbody tr:hover { background: #f4f6f8; }
figure { margin: 1.5rem 0; } img { max-width: 100%; height: auto; }
figcaption { color: #555; font-size: 0.9rem; }
pre { background: #f4f6f8; padding: 0.8rem; overflow-x: auto; font-size: 0.85rem; white-space: pre-wrap; }
"""


def as_markdown(blocks: list[Block]) -> str:
    """The document for a repository; plots are PNG files beside it."""
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def as_html(blocks: list[Block], folder: Path) -> str:
    """The document for a browser; plots are read from ``folder`` and become part of it."""
    title = next(block.text for block in blocks if isinstance(block, Heading))
    body = "\n".join(_html(block, folder) for block in blocks)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>\n{body}\n'
        "</body></html>\n"
    )


def _markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {text}"
        case Text(text):
            return text
        case Items(items):
            return "\n".join(f"- {' '.join(item.split())}" for item in items)
        case Table(head, rows):
            lines = [head, ("---", *["---:"] * (len(head) - 1)), *rows]
            return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        case Plot(name, caption):
            return f"![{caption}]({name}.png)\n\n{caption}."
        case Code(text):
            return "\n".join(f"    {line}" for line in text.splitlines())


def _html(block: Block, folder: Path) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Text(text):
            return f"<p>{html.escape(text)}</p>"
        case Items(items):
            return "<ul>" + "".join(f"<li>{html.escape(item)}</li>" for item in items) + "</ul>"
        case Table(head, rows):
            top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
            lines = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
            body = "".join(f"<tr>{line}</tr>" for line in lines)
            return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
        case Plot(name, caption):
            image = base64.b64encode((folder / f"{name}.svg").read_bytes()).decode()
            said = html.escape(caption)
            return (
                f'<figure><img alt="{said}" src="data:image/svg+xml;base64,{image}">'
                f"<figcaption>{said}</figcaption></figure>"
            )
        case Code(text):
            return f"<pre>{html.escape(text)}</pre>"
