"""A table as text, in colours where `rich` draws it, and as HTML in a notebook.

Apart from the rest because it knows about terminals: characters, widths and colours. It needs no import of `rich`: a
console that draws a table makes the text.
"""

import dataclasses
import html
import itertools
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

WIDTH = 100
"""The most characters in a line of printed text."""
_NAME = 12  # characters that are left of a name where there is no room


class Drawing(NamedTuple):
    """Blocks, and the style of each: green while there is signal, red where none was found."""

    blocks: str
    styles: tuple[str, ...]

    @property
    def last(self) -> str:
        return self.styles[-1] if self.styles else ""


@dataclass(frozen=True)
class Table:
    """Rows of text, the last of them the total: `str()` aligns them, `rich` also colours them, and so do notebooks.

    drawings: one per row, or none at all. spare: the columns that are left out first where a line is too long. notes:
    what the legend says of a column, while it is there.
    """

    title: str
    heads: tuple[str, ...]
    rows: list[list[str]]
    legend: str
    drawn: str = ""
    drawings: tuple[Drawing, ...] = ()
    spare: tuple[str, ...] = ()
    notes: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def _texts(self) -> list[str]:
        """The head and the rows, without their drawings."""
        lines = [self.heads, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return [
            "  ".join([line[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(line[1:], widths[1:], strict=True))])
            for line in lines
        ]

    def _blocks(self) -> list[str]:
        """What stands beside the head and the rows."""
        blocks = [drawing.blocks for drawing in self.drawings]
        return [f"  {x}" for x in (self.drawn, *blocks)] if blocks else [""] * (1 + len(self.rows))

    @property
    def width(self) -> int:
        """The characters in the longest line of the table, whose title and legend may be longer."""
        return len(self._texts()[0]) + max(map(len, self._blocks()))

    @property
    def explained(self) -> str:
        """The legend, with the notes on the columns that are there."""
        return "; ".join([*(self.notes[head] for head in self.heads if head in self.notes), self.legend])

    def __str__(self) -> str:
        table = self.within(WIDTH)
        head, *rows, total = [(text + x).rstrip() for text, x in zip(table._texts(), table._blocks(), strict=True)]
        title, legend = (textwrap.fill(text, WIDTH) for text in (table.title, table.explained))
        return "\n".join([title, head, *rows, "-" * table.width, total, legend])

    def within(self, width: int) -> "Table":
        """The same in so many characters: without columns that have no room, which the legend names, then with names
        that lack their middle."""
        table, spare = self, list(self.spare)
        while spare and table.width > width:
            gone = table.heads.index(spare.pop(0))
            heads, *rows = [[*line[:gone], *line[gone + 1 :]] for line in (table.heads, *table.rows)]
            table = dataclasses.replace(table, heads=tuple(heads), rows=rows)
        gone = ", ".join(head for head in self.heads if head not in table.heads)
        if table.width > width:
            room = max(max(len(row[0]) for row in table.rows) - (table.width - width), _NAME)
            table = dataclasses.replace(table, rows=[[_shortened(row[0], room), *row[1:]] for row in table.rows])
        return dataclasses.replace(table, legend=f"{table.legend}; no room for {gone}") if gone else table

    def _repr_html_(self) -> str:
        """For notebooks: a plain table in the notebook's own colours."""

        def line(tag: str, cells, drawing: str) -> str:
            made = [f"<{tag} style='text-align:left'>{html.escape(cells[0])}</{tag}>"]
            made += [f"<{tag} style='text-align:right'>{html.escape(x)}</{tag}>" for x in cells[1:]]
            return "".join([*made, f"<{tag} style='text-align:left'>{drawing}</{tag}>" if self.drawings else ""])

        def runs(drawing: Drawing) -> str:
            grouped = itertools.groupby(zip(*drawing, strict=True), lambda block: block[1])
            spans = [(style or "inherit", "".join(block for block, _ in run)) for style, run in grouped]
            made = "".join(f"<span style='color:{color}'>{html.escape(blocks)}</span>" for color, blocks in spans)
            return f"<span style='font-family:monospace;white-space:pre'>{made}</span>"

        drawings = [runs(drawing) for drawing in self.drawings] or [""] * len(self.rows)
        *rows, total = [f"<tr>{line('td', *row)}</tr>" for row in zip(self.rows, drawings, strict=True)]
        head = line("th", self.heads, html.escape(self.drawn))
        return (
            f"<table><caption style='text-align:left'>{html.escape(self.title)}</caption>"
            f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody><tfoot>{total}</tfoot></table>"
            f"<p style='max-width:60em'><small>{html.escape(self.explained)}</small></p>"
        )

    def __rich_console__(self, console, options):
        """Lines in colour, each in the kind of text that the console makes, without its own ideas about numbers."""

        def line(text: str, style: str):
            made = console.render_str(text, style=style, markup=False, highlight=False, emoji=False)
            made.no_wrap, made.overflow = True, "ellipsis"
            return made

        table = self.within(options.max_width)
        (head, *texts), (drawn, *_) = table._texts(), table._blocks()
        yield line(table.title, "bold")
        yield line(head + drawn, "bold")
        for i, text in enumerate(texts):
            if i == len(texts) - 1:
                yield line("-" * table.width, "dim")
            drawing = table.drawings[i] if table.drawings else Drawing("", ())
            made = line(f"{text}  ", drawing.last)
            for style, run in itertools.groupby(zip(*drawing, strict=True), lambda block: block[1]):
                made.append("".join(block for block, _ in run), style)
            yield made
        colored = any(style for drawing in table.drawings for style in drawing.styles)
        colors = "; green: signal was found, red: it was not" if colored else ""
        yield console.render_str(table.explained + colors, style="dim", markup=False, highlight=False, emoji=False)


def _shortened(name: str, width: int) -> str:
    """A name without its middle, if it is too long."""
    left = (width - 1) // 2
    return name if len(name) <= width else f"{name[:left]}…{name[left + 1 - width :]}"
