"""A table as Markdown, CSV, LaTeX and HTML, and the names of its files."""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate

from shard_builder.settings import printable


@dataclass(frozen=True)
class Table:
    """A table of texts. `groups` are headings above those of the columns, each with the number of columns it spans."""

    name: str
    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    groups: Sequence[tuple[str, int]] = ()


def shown(text: str) -> str:
    """`text` as a part of an HTML page: no tags, no line ends, no marks that reverse the direction of writing."""
    return escape(printable(text))


def _flat_head(table: Table) -> list[str]:
    """The headings in one line, each after that of its group."""
    groups = [name for name, columns in table.groups for _ in range(columns)] or [""] * len(table.head)
    return [f"{group} {head}".strip() for group, head in zip(groups, table.head, strict=True)]


def to_markdown(table: Table) -> str:
    """The table with its title and note. Names become no HTML, no links and no images, which a viewer would fetch."""

    def text(cell: str) -> str:
        return re.sub(r"[\\|]|\](?=\()", r"\\\g<0>", printable(cell)).replace("<", "&lt;")

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(map(text, cells)) + " |"

    rule = ["---"] * len(table.head)
    lines = [f"### {text(table.title)}", "", *map(line, [_flat_head(table), rule, *table.rows])]
    return "\n".join([*lines, *(["", text(table.note)] if table.note else [])]) + "\n"


def to_csv(table: Table) -> str:
    """The headings and rows, without title and note.

    A text that a spreadsheet would run as a formula gets an apostrophe before it.
    """
    number = re.compile(r"[+-]?\d+(\.\d+)?(e[+-]?\d+)?")

    def cell(text: str) -> str:
        text = printable(text)
        return f"'{text}" if text.strip()[:1] in {*"=+-@"} and not number.fullmatch(text) else text

    text = io.StringIO()
    rows = ([cell(each) for each in row] for row in [_flat_head(table), *table.rows])
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"<": "$<$", ">": "$>$", "–": "--", "ⁿ": "$^n$"},
}


def to_latex(table: Table) -> str:
    """A table float; needs the packages booktabs and graphicx."""

    def tex(text: str) -> str:
        return "".join(LATEX.get(character, character) for character in printable(text))

    def line(cells: Sequence[str]) -> str:
        text = " & ".join(cells)
        # After the end of a line, LaTeX takes a bracket or a star for an option of it.
        return ("{}" if text.startswith(("[", "*")) else "") + text + r" \\"

    lines = [r"\begin{table}", r"\centering", rf"\caption{{{tex(table.title)}. {tex(table.note)}}}"]
    lines += [r"\resizebox{\linewidth}{!}{%", rf"\begin{{tabular}}{{{'l' * len(table.head)}}}", r"\toprule"]
    if table.groups:
        lines.append(line([rf"\multicolumn{{{columns}}}{{c}}{{{tex(name)}}}" for name, columns in table.groups]))
    lines += [line(list(map(tex, table.head))), r"\midrule"]
    lines += [line(list(map(tex, row))) for row in table.rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}}", r"\end{table}"]) + "\n"


def to_html(table: Table) -> str:
    """An HTML figure with the table, which scrolls sideways if it is wider than the screen."""

    def cell(kind: str, text: str, attributes: str = "") -> str:
        return f"<{kind}{attributes}>{shown(text)}</{kind}>"

    # The first column of a group gets a rule, the paper's own columns a tint.
    opening = set(accumulate((columns for _, columns in table.groups), initial=0))
    classes = [
        " ".join(["opens"] * (index in opening and index > 0) + ["theirs"] * text.startswith("paper "))
        for index, text in enumerate(table.head)
    ]
    marks = [f' class="{names}"' if names else "" for names in classes]
    groups = "".join(cell("th", name, f' colspan="{columns}" scope="colgroup"') for name, columns in table.groups)
    above = f'<tr class="groups">{groups}</tr>' if table.groups else ""
    head = "".join(cell("th", text, f' scope="col"{mark}') for text, mark in zip(table.head, marks, strict=True))
    body = "".join(
        "<tr>" + "".join(cell("td", text, mark) for text, mark in zip(row, marks, strict=True)) + "</tr>\n"
        for row in table.rows
    )
    note = f"<figcaption>{shown(table.note)}</figcaption>" if table.note else ""
    return (
        f'<figure class="table" id="{shown(table.name)}"><h3>{shown(table.title)}</h3>'
        f'<div class="scroll" tabindex="0"><table><thead>{above}<tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>'
        f"</div>{note}</figure>"
    )


def to_files(table: Table) -> dict[str, str]:
    """The contents of the table's files, by name."""
    forms = {"md": to_markdown, "csv": to_csv, "tex": to_latex}
    return {file_name(f"{table.name}.{ending}"): form(table) for ending, form in forms.items()}


def file_name(text: str) -> str:
    """`text` as the name of a file: a task in a stranger's results may hold a path, or be too long."""
    name = re.sub(r"[^\w.+-]", "_", text)
    if len(name.encode()) <= 200:
        return name
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
    return f"{name[:40]}-{digest[:8]}{name[-5:] if '.' in name[-5:] else ''}"
