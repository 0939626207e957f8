"""HTML by the piece: escaped text, tables, embedded pictures, the page's frame and its style."""

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxdl.report.table import format_number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
:root{color-scheme:light dark;--page:#f6f7f9;--card:#fff;--ink:#1f2630;--soft:#66707f;--line:#e3e6eb;--tint:#eef2fb;
--accent:#3558c0;--good:#2c8a45;--warn:#b26a00;--bad:#c0392b}
@media (prefers-color-scheme:dark){:root{--page:#14171c;--card:#1c2027;--ink:#e4e8ee;--soft:#98a2b1;--line:#2e343e;
--tint:#232a38;--accent:#8fabff;--good:#6fce87;--warn:#f0b35a;--bad:#ff8577}
img.plot{filter:invert(.89) hue-rotate(180deg)}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Liberation Sans",sans-serif;-webkit-text-size-adjust:100%}
main{max-width:1080px;margin:0 auto;padding:36px 24px 64px}
h1{font-size:28px;line-height:1.2;margin:0 0 4px;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:18px;margin:0 0 14px}
h3{font-size:14px;margin:20px 0 8px;color:var(--soft);font-weight:600}
p{margin:0 0 10px;overflow-wrap:anywhere}.soft{color:var(--soft)}
section{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:22px 24px;margin-top:18px}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:12px;margin-top:22px}
.tile{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:12px 16px}
.tile b{display:block;font-size:23px;font-weight:650;letter-spacing:-.01em;font-variant-numeric:tabular-nums;
overflow-wrap:anywhere}
.tile span{color:var(--soft);font-size:13px;overflow-wrap:anywhere}
.facts{display:flex;flex-wrap:wrap;gap:4px 22px;margin-top:16px;color:var(--soft);font-size:14px}
.facts b{color:var(--ink);font-weight:600}
.verdict{display:inline-block;border-radius:999px;padding:3px 14px;font-weight:650;background:var(--tint);
color:var(--accent);margin-bottom:12px}
.verdict.good{color:var(--good)}.verdict.warn{color:var(--warn)}.verdict.bad{color:var(--bad)}
ul{margin:0 0 6px;padding-left:20px}li{margin:3px 0;overflow-wrap:anywhere}
.columns{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:18px 28px;
align-items:start}
.columns>*{min-width:0}
img.plot,img.sheet{display:block;width:100%;height:auto}img.sheet{border-radius:8px}
.narrow{max-width:640px}
.wide{overflow-x:auto;-webkit-overflow-scrolling:touch}
table{border-collapse:collapse;min-width:min(100%,460px);font-size:13.5px;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:6px 28px 6px 0;border-bottom:1px solid var(--line);vertical-align:top}
th{color:var(--soft);font-weight:600;white-space:nowrap}
td.number,th.number{text-align:right;white-space:nowrap}
th:last-child,td:last-child{padding-right:0}tbody tr:last-child td{border-bottom:0}
td.code{font-family:ui-monospace,"SF Mono",Menlo,Consolas,"Liberation Mono",monospace;font-size:12.5px;
overflow-wrap:anywhere}
.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(118px,1fr));gap:16px}
figure{margin:0}figcaption{font-size:13px;line-height:1.4;margin-top:6px;overflow-wrap:anywhere}
img.picture{display:block;width:100%;aspect-ratio:1;object-fit:contain;image-rendering:pixelated;background:#0002;
border-radius:8px}
details>summary{cursor:pointer;color:var(--accent);font-weight:600;margin:2px 0 8px}
footer{color:var(--soft);font-size:13px;margin-top:26px;text-align:center}
@media (max-width:640px){main{padding:22px 14px 40px}section{padding:16px}h1{font-size:23px}.tile b{font-size:20px}}
@media print{body{background:#fff}section,.tile{break-inside:avoid}}
"""


def escape(value: Any) -> str:
    """Any value as text that is safe between tags and in quoted attributes.

    Example:
      >>> escape('<b> & "c"')
      '&lt;b&gt; &amp; &quot;c&quot;'
    """
    return html.escape(format_number(value), quote=True)


def tag(name: str, *content: str, **attributes: str) -> str:
    """An element around content that is HTML already; attribute values are escaped, `class_` is `class`.

    Example:
      >>> tag("p", escape("a < b"), class_="soft")
      '<p class="soft">a &lt; b</p>'
    """
    text = "".join(f' {key.rstrip("_")}="{escape(value)}"' for key, value in attributes.items())
    return f"<{name}{text}>{''.join(content)}</{name}>"


def bullets(lines: Iterable[str]) -> str:
    """A list of plain sentences.

    Example:
      >>> bullets(["one", "<two>"])
      '<ul><li>one</li><li>&lt;two&gt;</li></ul>'
    """
    return tag("ul", *(tag("li", escape(line)) for line in lines))


def html_table(rows: Sequence[Mapping[str, Any]], *, code: Sequence[str] = (), numbers: Sequence[str] = ()) -> str:
    """Rows as a table that scrolls sideways where it is too wide; columns of numbers stand to the right.

    Args:
      rows: dicts; the columns are the names in order of appearance, a missing value is blank.
      code: columns in a monospaced font.
      numbers: columns of text that stand to the right too.

    Example:
      >>> "<td>b</td>" in html_table([{"a": "b"}])
      True
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    classes = {}
    for name in columns:
        is_number = name in numbers or _are_numbers([row.get(name) for row in rows])
        kind = "code" if name in code else "number" if is_number else ""
        classes[name] = {"class_": kind} if kind else {}
    head = tag("tr", *(tag("th", escape(name), **classes[name]) for name in columns))
    body = "".join(tag("tr", *(tag("td", escape(row.get(name)), **classes[name]) for name in columns)) for row in rows)
    return tag("div", tag("table", tag("thead", head), tag("tbody", body)), class_="wide")


def _are_numbers(values: Sequence[Any]) -> bool:
    given = [value for value in values if value is not None]
    return bool(given) and all(isinstance(v, (int, float, np.number)) and not isinstance(v, bool) for v in given)


def fold(summary: str, content: str) -> str:
    """Content that opens on a click.

    Example:
      >>> fold("All", "<p>x</p>")
      '<details><summary>All</summary><p>x</p></details>'
    """
    return tag("details", tag("summary", escape(summary)), content)


def embed_figure(figure: "Figure", *, alt: str, has_colors: bool = False) -> str:
    """A matplotlib figure as an `<img>`.

    Args:
      figure: the figure.
      alt: what it shows, for those who cannot see it.
      has_colors: it holds pictures whose colours must stay; it keeps its white background on a dark page. Otherwise
        the background is transparent, and a dark page turns the ink light.
    """
    from jaxdl.report.canvas import save_png

    file = io.BytesIO()
    save_png(figure, file, transparent=not has_colors)
    return _image(file.getvalue(), alt, "sheet" if has_colors else "plot")


def embed_picture(pixels: np.ndarray, *, alt: str) -> str:
    """An example as an `<img>` that the page enlarges without blurring it.

    Args:
      pixels: `(H, W, 3)` uint8.
      alt: what it shows.
    """
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG")
    return _image(file.getvalue(), alt, "picture")


def _image(png: bytes, alt: str, kind: str) -> str:
    data = base64.b64encode(png).decode("ascii")
    return f'<img class="{kind}" alt="{escape(alt)}" src="data:image/png;base64,{data}">'


def frame(title: str, body: str) -> str:
    """The whole document around its body.

    Example:
      >>> frame("<run>", "")[:15]
      '<!doctype html>'
    """
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style>"
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body><main>\n{body}\n</main></body></html>\n'
