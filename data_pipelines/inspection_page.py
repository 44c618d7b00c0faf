"""How an inspection looks: a table for the terminal, and one page whose style, charts, audio and script are inline."""

import json
import math
from collections import Counter
from collections.abc import Sequence

import jinja2
from markupsafe import Markup

from data_pipelines.balance import DrawConfig
from data_pipelines.inspection import LENGTH_EDGES, LISTED, Inspection, Rates, drawn
from data_pipelines.languages import name_of

# Name: (light, dark); those of the training report.
COLOURS = {
    "page": ("#f4f5f7", "#0f1215"),
    "card": ("#fffffe", "#191d22"),
    "ink": ("#191c20", "#e9ebee"),
    "muted": ("#5c6470", "#a2aab6"),
    "line": ("#e2e5ea", "#2e343c"),
    "green": ("#00855f", "#2fbf94"),
    "blue": ("#0069ab", "#5fb4ee"),
}
BAR, HIGH = 9, 26  # pixels of a bar of a histogram: its width, and the height of the highest


def table_text(
    found: Inspection, *, draws: Sequence[DrawConfig], steps: int | None = None, seconds_per_step: float = 64.0
) -> str:
    """The terminal's form: a line a language, its share under each of `draws` (and epochs in a run of `steps`)."""
    laws = [
        drawn(found.train_seconds, cfg=cfg, steps=steps, seconds_per_step=seconds_per_step)
        if found.train_seconds
        else {}
        for cfg in draws
    ]
    heads = [f"a={cfg.language_exponent:g}" for cfg in draws]
    titles = [f"{head:>9}" for head in heads] + ([f"{'ep ' + head:>9}" for head in heads] if steps is not None else [])
    lines = [
        f"{'':<4} {'language':<20} {'hours':>9} {'train':>9} {'clips':>9} {'utts':>9} {'min':>6} {'median':>6} "
        f"{'max':>7} {'corpora':>7} {'source Hz':<16}{' '.join(titles)}"
    ]
    for one in found.languages:
        own = [law.get(one.language) for law in laws]
        shares = [f"{d.share:>9.3%}" if d else f"{'-':>9}" for d in own]
        epochs = [f"{d.epochs:>9,.2f}" if d else f"{'-':>9}" for d in own] if steps is not None else []
        lines.append(
            f"{one.language:<4} {name_of(one.language)[:20]:<20} {one.seconds / 3600:>9,.3f} {one.train / 3600:>9,.3f} "
            f"{one.clips:>9,} {one.utterances:>9,} {one.shortest:>6.1f} {one.median:>6.1f} {one.longest:>7.1f} "
            f"{len(one.corpora):>7} {_rates(one.rates):<16}{' '.join(shares + epochs)}"
        )
    total, train = (sum(values) / 3600 for values in zip(*((o.seconds, o.train) for o in found.languages), strict=True))
    clips, names = sum(o.clips for o in found.languages), {name for o in found.languages for name in o.corpora}
    lines.append(
        f"{'all':<25} {total:>9,.3f} {train:>9,.3f} {clips:>9,} {found.utterances:>9,} {'':>21} {len(names):>7}"
    )
    lines.append("shares are of the drawn seconds" + (f"; ep: epochs in {steps:,} steps" if steps is not None else ""))
    lines.append(looked_at(found))
    for suspect in found.suspects:
        if suspect.row in found.descriptions:
            lines.append(f"  {suspect.kind:<9} {found.descriptions[suspect.row]}: {suspect.says}")
    return "\n".join(lines)


def looked_at(found: Inspection) -> str:
    """Which utterances were decoded and what was wrong with how many."""
    counts = Counter(suspect.kind for suspect in found.suspects)
    said = ", ".join(f"{counts.get(kind, 0):,} {kind}" for kind in ("silent", "clipped", "duplicate"))
    more = f" (at most {LISTED} of a kind are listed)" if counts and max(counts.values()) > LISTED else ""
    if found.decoded == found.utterances:
        return f"all {found.utterances:,} utterances were decoded: {said}{more}"
    return f"{found.decoded:,} of {found.utterances:,} utterances were decoded, --decode takes all: {said}{more}"


def render(found: Inspection, *, draw: DrawConfig, steps: int | None = None, seconds_per_step: float = 64.0) -> str:
    """The whole page. Every text is escaped; it asks for nothing from anywhere."""
    names = [one.language for one in found.languages]
    data = {
        "languages": names,
        "pairs": [
            [names.index(language), corpus, seconds] for (language, corpus), seconds in found.train_seconds.items()
        ],
    }
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    themes = [";".join(f"--{name}:{pair[dark]}" for name, pair in COLOURS.items()) for dark in (0, 1)]
    total = [0] * len(LENGTH_EDGES)
    for one in found.languages:
        total = [a + b for a, b in zip(total, one.histogram, strict=True)]
    return environment.from_string(TEMPLATE).render(
        found=found,
        hours=sum(one.seconds for one in found.languages) / 3600,
        corpora=len({name for one in found.languages for name in one.corpora}),
        languages=[
            {"one": one, "name": name_of(one.language), "svg": histogram(one.histogram), "rates": _rates(one.rates)}
            for one in found.languages
        ],
        whole=histogram(total, scale=3.0),
        looked=looked_at(found),
        listed=[suspect for suspect in found.suspects if suspect.row in found.descriptions],
        sound={heard.row: heard.flac for heard in found.heard_suspects},
        draw=draw,
        steps=steps if steps is not None else 100_000,
        seconds_per_step=f"{seconds_per_step:g}",
        style=Markup(STYLE),
        script=Markup(SCRIPT),
        data=Markup(json.dumps(data, ensure_ascii=True).replace("<", "\\u003c")),
        themes=[Markup(theme) for theme in themes],
    )


def histogram(counts: Sequence[int], *, scale: float = 1.0) -> Markup:
    """Counts between `LENGTH_EDGES` as a small SVG element, with the numbers as its title."""
    most = max(counts, default=0) or 1
    ends = [
        *(f"{a}-{b} s" for a, b in zip(LENGTH_EDGES, LENGTH_EDGES[1:], strict=False)),
        f"{LENGTH_EDGES[-1]} s and more",
    ]
    bars = Markup("").join(
        Markup('<rect x="{}" y="{:.1f}" width="{}" height="{:.1f}"/>').format(
            k * BAR, HIGH * (1 - count / most), BAR - 1, HIGH * count / most
        )
        for k, count in enumerate(counts)
    )
    title = "; ".join(f"{end}: {count:,}" for end, count in zip(ends, counts, strict=True) if count)
    width = BAR * len(counts)
    return Markup(
        '<svg class="bars" width="{:.0f}" height="{:.0f}" viewBox="0 0 {} {}" role="img"><title>{}</title>{}</svg>'
    ).format(width * scale, HIGH * scale, width, HIGH, title, bars)


def _rates(rates: Rates) -> str:
    total = math.fsum(rates.seconds.values())
    if not total:
        return "not noted"
    by_share = sorted(rates.seconds.items(), key=lambda pair: -pair[1])
    if len(by_share) == 1:
        return f"{by_share[0][0]}"
    return f"{by_share[0][0]} {by_share[0][1] / total:.0%}, +{len(by_share) - 1}"


STYLE = """
*{box-sizing:border-box}
html{color-scheme:light dark}
body{margin:0;background:var(--page);color:var(--ink);
  font:16px/1.5 Inter,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main,header{max-width:1240px;margin:0 auto;padding:0 24px}
header{padding-top:40px}
h1{font-size:32px;letter-spacing:-.02em;margin:0 0 8px}
h2{font-size:22px;margin:0 0 8px}
p{margin:0 0 12px;max-width:80ch}
.muted,header p{color:var(--muted);font-size:14px}
section{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:24px 28px;margin:0 0 20px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:5px 14px 5px 0;border-bottom:1px solid var(--line);vertical-align:middle}
th{color:var(--muted);font-weight:500;font-size:13px}
.n{text-align:right;white-space:nowrap}
svg.bars{display:block;fill:var(--blue)}
.bar{background:var(--green);height:10px;border-radius:2px;min-width:1px}
.cell{width:220px}
label{margin-right:22px;font-size:14px}
input[type=range]{width:220px;vertical-align:middle}
input[type=number]{width:110px}
audio{height:30px;width:230px;vertical-align:middle}
"""

# The same law as balance.leaf_shares: languages by seconds ** alpha, then the corpora of each by seconds ** beta.
SCRIPT = """
const data=JSON.parse(document.getElementById('data').textContent),get=id=>document.getElementById(id);
function shares(alpha,beta){
  const own=data.languages.map(()=>0);
  for(const [l,,s] of data.pairs) own[l]+=s;
  const most=Math.max(...own),powers=own.map(s=>s>0?Math.pow(s/most,alpha):0);
  const total=powers.reduce((a,b)=>a+b,0)||1;
  const leaves=data.pairs.map(([l,c,s])=>{
    const inside=data.pairs.filter(p=>p[0]===l),top=Math.max(...inside.map(p=>p[2]));
    const sum=inside.reduce((a,p)=>a+Math.pow(p[2]/top,beta),0);
    return [l,c,s,powers[l]/total*Math.pow(s/top,beta)/sum];
  });
  return {own,languages:powers.map(p=>p/total),leaves};
}
function show(){
  const alpha=+get('alpha').value,beta=+get('beta').value,run=get('steps').value*get('seconds').value;
  get('alpha-said').textContent=alpha.toFixed(2);get('beta-said').textContent=beta.toFixed(2);
  const s=shares(alpha,beta),top=Math.max(...s.languages,1e-12),all=s.own.reduce((a,b)=>a+b,0)||1;
  data.languages.forEach((name,l)=>{
    get('natural-'+l).textContent=(100*s.own[l]/all).toFixed(3)+' %';
    get('share-'+l).textContent=(100*s.languages[l]).toFixed(3)+' %';
    get('bar-'+l).style.width=(100*s.languages[l]/top)+'%';
    get('epochs-'+l).textContent=s.own[l]?(run*s.languages[l]/s.own[l]).toFixed(2):'-';
    get('corpora-'+l).textContent=s.leaves.filter(p=>p[0]===l).sort((a,b)=>b[3]-a[3])
      .map(p=>p[1]+' '+(run*p[3]/p[2]).toFixed(2)).join(', ');
  });
}
for(const id of ['alpha','beta','steps','seconds']) get(id).addEventListener('input',show);
show();
"""

TEMPLATE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ found.root.name }} · inspection</title>
<style>
:root{ {{- themes[0] -}} }
@media (prefers-color-scheme:dark){:root{ {{- themes[1] -}} }}
{{ style }}</style>
</head>
<body>
<header>
<h1>{{ found.root.name }}</h1>
<p>{{ '{:,.2f}'.format(hours) }} h · {{ found.languages|length }} languages · {{ corpora }} corpora ·
{{ '{:,}'.format(found.utterances) }} utterances · fingerprint {{ found.fingerprint[:16] }}</p>
</header>
<main>
<section id="lengths">
<h2>Lengths</h2>
<p class="muted">Utterances by length; a bar's numbers show when the pointer rests on it.</p>
{{ whole }}
</section>
<section id="languages">
<h2>Languages</h2>
<div class="scroll"><table>
<thead><tr><th></th><th>language</th><th class="n">hours</th><th class="n">train</th><th class="n">clips</th>
<th class="n">utterances</th><th class="n">shortest, s</th><th class="n">median</th><th class="n">longest</th>
<th>lengths</th><th>source Hz</th><th>corpora, hours</th></tr></thead>
<tbody>
{% for row in languages %}
<tr><td>{{ row.one.language }}</td><td>{{ row.name }}</td>
<td class="n">{{ '{:,.3f}'.format(row.one.seconds / 3600) }}</td>
<td class="n">{{ '{:,.3f}'.format(row.one.train / 3600) }}</td><td class="n">{{ '{:,}'.format(row.one.clips) }}</td>
<td class="n">{{ '{:,}'.format(row.one.utterances) }}</td><td class="n">{{ '%.1f' % row.one.shortest }}</td>
<td class="n">{{ '%.1f' % row.one.median }}</td><td class="n">{{ '%.1f' % row.one.longest }}</td><td>{{ row.svg }}</td>
<td>{{ row.rates }}</td>
<td>{% for name, seconds in row.one.corpora.items() %}{{ name }} {{ '{:,.3f}'.format(seconds / 3600) }}
{%- if not loop.last %}, {% endif %}{% endfor %}</td></tr>
{% endfor %}
</tbody></table></div>
</section>
<section id="balance">
<h2>What a balance draws</h2>
<p>Seconds ** alpha over languages, seconds ** beta over the corpora of each; 1 is as found, 0 is all alike. Epochs: how
often a run hears each language's training audio, and each corpus of it.</p>
<p><label>alpha <input id="alpha" type="range" min="0" max="1" step="0.01" value="{{ draw.language_exponent }}">
<b id="alpha-said"></b></label>
<label>beta <input id="beta" type="range" min="0" max="1" step="0.01" value="{{ draw.corpus_exponent }}">
<b id="beta-said"></b></label>
<label>steps <input id="steps" type="number" min="1" value="{{ steps }}"></label>
<label>seconds a step <input id="seconds" type="number" min="1" step="any" value="{{ seconds_per_step }}"></label></p>
<div class="scroll"><table>
<thead><tr><th></th><th class="n">as found</th><th class="n">drawn</th><th class="cell"></th><th class="n">epochs</th>
<th>epochs by corpus</th></tr></thead>
<tbody>
{% for row in languages %}
<tr><td>{{ row.one.language }}</td><td class="n" id="natural-{{ loop.index0 }}"></td>
<td class="n" id="share-{{ loop.index0 }}"></td><td class="cell"><div class="bar" id="bar-{{ loop.index0 }}"></div></td>
<td class="n" id="epochs-{{ loop.index0 }}"></td><td id="corpora-{{ loop.index0 }}"></td></tr>
{% endfor %}
</tbody></table></div>
</section>
<section id="suspicious">
<h2>Suspicious rows</h2>
<p>{{ looked }}.</p>
{% if listed %}
<div class="scroll"><table>
<thead><tr><th>what</th><th>which</th><th>how much</th><th></th></tr></thead>
<tbody>
{% for suspect in listed %}
<tr><td>{{ suspect.kind }}</td><td>{{ found.descriptions[suspect.row] }}</td><td>{{ suspect.says }}</td>
<td>{% if suspect.row in sound %}<audio controls preload="none" src="data:audio/flac;base64,{{ sound[suspect.row] }}">
</audio>{% endif %}</td></tr>
{% endfor %}
</tbody></table></div>
{% endif %}
</section>
<section id="listen">
<h2>Listen</h2>
<p class="muted">{{ found.heard|length }} stretches of at most 3 s, drawn at random.</p>
<div class="scroll"><table><tbody>
{% for heard in found.heard|sort(attribute="language") %}
<tr><td>{{ heard.language }}</td><td>
<audio controls preload="none" src="data:audio/flac;base64,{{ heard.flac }}"></audio></td><td>{{ heard.name }}</td></tr>
{% endfor %}
</tbody></table></div>
</section>
</main>
<script type="application/json" id="data">{{ data }}</script>
<script>{{ script }}</script>
</body>
</html>
"""
