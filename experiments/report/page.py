"""How the report looks: colours and marks that page and charts share, the blocks a section is made of, the template.

Nothing here knows what the numbers mean. The page is one file: its style is inline, its charts are inline SVG, and it
asks for nothing from anywhere.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jinja2
from markupsafe import Markup

# Name: (light, dark). The five series colours are after Okabe and Ito's palette, which stays apart in the common colour
# blindnesses; every series has a marker of its own as well.
COLOURS = {
    "page": ("#f4f5f7", "#0f1215"),
    "card": ("#fffffe", "#191d22"),
    "ink": ("#191c20", "#e9ebee"),
    "muted": ("#5c6470", "#a2aab6"),
    "faint": ("#9aa2ae", "#6b7480"),
    "line": ("#e2e5ea", "#2e343c"),
    "green": ("#00855f", "#2fbf94"),
    "vermillion": ("#d0550a", "#f28b4f"),
    "blue": ("#0069ab", "#5fb4ee"),
    "purple": ("#b4588c", "#dd9cc3"),
    "amber": ("#c28100", "#eab543"),
}
SHAPES = {  # matplotlib's marker: the same shape as an SVG path in a 12 x 12 box, for legends in the page
    "o": "M6 1.5a4.5 4.5 0 1 0 .01 0z",
    "s": "M2 2h8v8h-8z",
    "^": "M6 1.5l5 9h-10z",
    "D": "M6 .8l5.2 5.2-5.2 5.2-5.2-5.2z",
    "v": "M6 10.5l5-9h-10z",
    "|": "M5 0h2v12h-2z",
    "x": "M2 3.2l1.2-1.2 2.8 2.8 2.8-2.8 1.2 1.2-2.8 2.8 2.8 2.8-1.2 1.2-2.8-2.8-2.8 2.8-1.2-1.2 2.8-2.8z",
}


class Look(NamedTuple):
    """How a series is drawn wherever it appears: the name of a colour of `COLOURS` and a matplotlib marker."""

    colour: str
    marker: str


class Table(NamedTuple):
    """Columns and rows of text; a column whose title starts with ">" holds numbers.

    `folded`: shown on request. `texts`: cells are long texts of any script, which are broken wherever they must be.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    folded: bool = False
    texts: bool = False
    kind: str = "table"


class Chart(NamedTuple):
    """One SVG element with a title; `wide` charts scroll sideways on a small screen instead of shrinking."""

    title: str
    svg: Markup
    wide: bool = False


class Figure(NamedTuple):
    """Charts under one `title` and legend, and what to make of them: what they show, what would be good, what to
    beware of."""

    charts: Sequence[Chart]
    legend: Sequence[tuple[Markup, str]]
    shows: str
    good: str = ""
    caution: str = ""
    title: str = ""
    kind: str = "figure"


class Note(NamedTuple):
    """A paragraph; `caution` sets it apart."""

    text: str
    caution: bool = False
    kind: str = "note"


class Section(NamedTuple):
    """A heading and its blocks; without blocks the page says that there is nothing."""

    anchor: str
    title: str
    lead: str
    blocks: Sequence[Table | Figure | Note]


class Finding(NamedTuple):
    """One sentence of the summary, the figure that stands before it, and its tone (better, worse, unclear, fact)."""

    figure: str
    text: str
    tone: str = "fact"


def swatch(look: Look, *, hollow: bool = False) -> Markup:
    """The mark of a series as a small SVG element, for a legend in the page."""
    paint = "fill:none;stroke:var(--{0});stroke-width:1.6" if hollow else "fill:var(--{0})"
    return Markup('<svg class="swatch" viewBox="0 0 12 12" aria-hidden="true"><path d="{}" style="{}"/></svg>').format(
        SHAPES[look.marker], paint.format(look.colour)
    )


def render(*, title: str, facts: Sequence[str], findings: Sequence[Finding], sections: Sequence[Section]) -> str:
    """The whole page. Every text is escaped; only Markup (charts, swatches) is taken as it is."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    themes = [";".join(f"--{name}:{pair[dark]}" for name, pair in COLOURS.items()) for dark in (0, 1)]
    return environment.from_string(TEMPLATE).render(
        title=title, facts=facts, findings=findings, sections=sections, style=Markup(STYLE), themes=map(Markup, themes)
    )


STYLE = """
*{box-sizing:border-box}
html{color-scheme:light dark;-webkit-text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0;background:var(--page);color:var(--ink);
  font:16px/1.55 Inter,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main,header,footer{max-width:1140px;margin:0 auto;padding:0 24px}
header{padding-top:48px}
h1{font-size:34px;line-height:1.15;letter-spacing:-.02em;margin:0 0 10px}
h2{font-size:23px;letter-spacing:-.01em;margin:0 0 6px}
h3{font-size:15px;margin:0 0 8px}
p{margin:0 0 10px;max-width:76ch}
a{color:var(--blue)}
.facts{color:var(--muted);font-size:14px;margin:0;padding:0;list-style:none}
.facts li{display:inline}
.facts li+li::before{content:"·";margin:0 8px;color:var(--faint)}
nav{margin:18px 0 28px;font-size:14px;display:flex;flex-wrap:wrap;gap:6px 18px}
nav a{text-decoration:none}
nav a:hover{text-decoration:underline}
section{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:28px 32px;margin:0 0 22px;
  scroll-margin-top:16px}
.lead{color:var(--muted);margin-bottom:20px}
section>:last-child{margin-bottom:0}
.missing{color:var(--muted);font-style:italic;margin:0}
.findings{list-style:none;margin:14px 0 0;padding:0}
.findings li{display:grid;grid-template-columns:132px 1fr;gap:22px;align-items:baseline;padding:12px 0;
  border-top:1px solid var(--line)}
.findings li:first-child{border-top:0}
.findings b{font-size:24px;line-height:1.2;letter-spacing:-.01em;font-variant-numeric:tabular-nums;text-align:right;
  white-space:nowrap}
.findings b.unclear{color:var(--muted);font-weight:500;font-size:20px}
.findings p{margin:0;max-width:88ch}
figure{margin:0 0 26px}
.charts{display:flex;flex-wrap:wrap;gap:22px 28px;align-items:flex-start}
.charts,.charts>div{max-width:100%;min-width:0}
.scroll{overflow-x:auto;max-width:100%}
svg.chart{display:block;max-width:100%;height:auto;overflow:visible}
svg.chart text{font-family:inherit;font-variant-numeric:tabular-nums}
svg.chart *{stroke-linejoin:round;stroke-linecap:butt}
.legend{display:flex;flex-wrap:wrap;gap:4px 20px;list-style:none;margin:0 0 14px;padding:0;font-size:14px}
.swatch{width:12px;height:12px;margin-right:7px;vertical-align:-1px;overflow:visible}
figcaption{font-size:14px;color:var(--muted);margin-top:14px;flex:1 1 250px;min-width:0}
figcaption p{margin:0 0 8px}
figcaption b{color:var(--ink)}
.below figcaption{display:grid;grid-template-columns:repeat(auto-fit,minmax(260px,1fr));gap:4px 32px}
.beside{display:flex;flex-wrap:wrap;gap:6px 32px;align-items:flex-start}
.note{font-size:15px;margin-bottom:16px}
.caution{border-left:3px solid var(--amber);padding-left:12px}
.table{overflow-x:auto;margin:0 0 22px}
table{border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums;min-width:min(100%,640px)}
caption{text-align:left;font-weight:600;padding:0 0 8px;font-size:15px}
th,td{text-align:left;padding:6px 18px 6px 0;border-bottom:1px solid var(--line);vertical-align:baseline}
th{color:var(--muted);font-weight:500;font-size:13px;vertical-align:bottom;border-bottom-color:var(--faint)}
th.n,td.n{text-align:right;padding:6px 0 6px 18px;white-space:nowrap}
th.n{white-space:normal}
.n+.t{padding-left:22px}
td.t:first-child{white-space:nowrap}
td .swatch{margin-right:9px}
.pill{white-space:nowrap;font-weight:600}
.better{color:var(--green)}.worse{color:var(--vermillion)}.unclear{color:var(--muted)}
.pill.unclear{font-weight:400}
.texts td.t+.t{overflow-wrap:anywhere;unicode-bidi:plaintext;width:42%}
details{margin:0 0 16px}
details+details{margin-top:-14px}
summary{cursor:pointer;color:var(--blue);font-size:14px;padding:4px 0;margin-bottom:6px}
footer{color:var(--muted);font-size:13px;padding-top:4px;padding-bottom:48px}
@media (max-width:640px){
  main,header,footer{padding-left:12px;padding-right:12px}
  header{padding-top:28px}
  h1{font-size:27px}
  section{padding:20px 16px;border-radius:10px}
  .findings li{grid-template-columns:1fr;gap:2px}
  .findings b{text-align:left}
  caption span{display:inline-block;position:sticky;left:0;max-width:calc(100vw - 58px)}
  table{border-collapse:separate;border-spacing:0}
  th,td{line-height:22px}
  th:first-child,td:first-child{position:sticky;left:0;z-index:1;background:var(--card)}
  td.t:first-child{white-space:normal;min-width:124px}
  th.n{min-width:78px}
  td.t+.t{min-width:116px}
  td.n+.t{min-width:150px}
  .scroll>svg.chart{max-width:none;width:480px}
}
@media print{
  body{background:none}
  section{border:0;padding:0;break-inside:auto}
  nav{display:none}
  figure,tr{break-inside:avoid}
}
"""

TEMPLATE = """\
{% macro table(block) %}
<div class="table{{ ' texts' if block.texts }}"><table>
{% if block.caption and not block.folded %}
<caption><span>{{ block.caption }}</span></caption>
{% endif %}
<thead><tr>{% for column in block.columns %}
<th scope="col" class="{{ 'n' if column.startswith('>') else 't' }}">{{ column.removeprefix('>') }}</th>
{%- endfor %}</tr></thead>
<tbody>
{% for row in block.rows %}
<tr>{% for cell in row %}
<td class="{{ 'n' if block.columns[loop.index0].startswith('>') else 't' }}">{{ cell }}</td>
{%- endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endmacro %}
{% macro figure(block) %}
<figure>
{% if block.title %}
<h3>{{ block.title }}</h3>
{% endif %}
{% if block.legend %}
<ul class="legend">{% for mark, text in block.legend %}<li>{{ mark }}{{ text }}</li>{% endfor %}</ul>
{% endif %}
<div class="{{ 'beside' if block.charts|length == 1 else 'below' }}">
<div class="charts">
{% for chart in block.charts %}
<div>{% if chart.title %}<h3>{{ chart.title }}</h3>{% endif %}
<div{% if chart.wide %} class="scroll"{% endif %}>{{ chart.svg }}</div></div>
{% endfor %}
</div>
<figcaption>
<p>{{ block.shows }}</p>
{% if block.good %}
<p><b>What would be good:</b> {{ block.good }}</p>
{% endif %}
{% if block.caution %}
<p class="caution"><b>Caution:</b> {{ block.caution }}</p>
{% endif %}
</figcaption>
</div>
</figure>
{% endmacro %}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }} · WavLab-JAX</title>
<style>
{% set light, dark = themes %}
:root{ {{- light -}} }
@media (prefers-color-scheme:dark){:root{ {{- dark -}} }}
{{ style }}</style>
</head>
<body>
<header>
<h1>{{ title }}</h1>
<ul class="facts">{% for fact in facts %}<li>{{ fact }}</li>{% endfor %}</ul>
<nav aria-label="Sections"><a href="#summary">Summary</a>
{% for section in sections %}
<a href="#{{ section.anchor }}">{{ section.title }}</a>
{% endfor %}
</nav>
</header>
<main>
<section id="summary">
<h2>What this run shows</h2>
{% if findings %}
<ul class="findings">
{% for finding in findings %}
<li><b class="{{ finding.tone }}">{{ finding.figure }}</b><p>{{ finding.text }}</p></li>
{% endfor %}
</ul>
{% else %}
<p class="missing">Not available: the results hold nothing to summarise.</p>
{% endif %}
</section>
{% for section in sections %}
<section id="{{ section.anchor }}">
<h2>{{ section.title }}</h2>
{% if section.blocks %}
<p class="lead">{{ section.lead }}</p>
{% for block in section.blocks %}
{% if block.kind == "figure" %}
{{ figure(block) }}
{% elif block.kind == "note" %}
<p class="note{{ ' caution' if block.caution }}">{{ block.text }}</p>
{% elif block.folded %}
<details><summary>{{ block.caption }}</summary>
{{ table(block) }}
</details>
{% else %}
{{ table(block) }}
{% endif %}
{% endfor %}
{% else %}
<p class="missing">Not available: this run left no results for this part.</p>
{% endif %}
</section>
{% endfor %}
</main>
<footer>Brackets hold intervals. Two results are called better or worse only where the interval of their difference
leaves out zero; otherwise they are not distinguishable here, which does not mean that they are equal.</footer>
</body>
</html>
"""
