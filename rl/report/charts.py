"""Charts of the pages of a report, as inline SVG: lines over steps, and shares with intervals by split.

    charts = Charts()
    html = charts.lines("Reward", "mean over completions", {"reward": [(0, 0.1), (1, 0.3)]})
    page = document(title, html + charts.data(), style=charts.STYLE, script=charts.SCRIPT)

Hovering a chart of lines, or the arrow keys once it has the focus, shows the values at a step. Series differ in colour
and dash, points in colour and shape. Names are untrusted, and escaped.
"""
import math

import numpy as np

from rl.report.web import SERIES, data_block, escape

WIDTH, HEIGHT = 520, 210
LEFT, RIGHT, TOP, BOTTOM = 52, 508, 8, 184      # of the axes, in the units of the viewBox
MOST_POINTS = 300                               # of a line; of more steps neighbours are averaged
DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2", "1 2", "12 4", "6 2 1 2 1 2")


def smoothed(values):
    """(n,) -> their centred moving average over a fifteenth of them."""
    window = np.ones(max(1, len(values) // 15))
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def thinned(points):
    """[(step, value)] -> as many or fewer: means of neighbours from MOST_POINTS on."""
    if len(points) <= MOST_POINTS:
        return points
    parts = np.array_split(np.array(points, dtype=float), MOST_POINTS)
    return [(float(part[:, 0].mean()), float(part[:, 1].mean())) for part in parts]


def ticks(low, high, most=5):
    """Round numbers between low and high, at most `most` + 1 of them."""
    span = high - low
    step = 10.0 ** math.floor(math.log10(span / most))
    for factor in (1, 2, 5, 10):
        if span / (step * factor) <= most:
            step *= factor
            break
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def short(value):
    """A number as a reader takes it in.

    >>> short(0.12345), short(12345.6), short(0.0000123), short(3.0)
    ('0.1235', '12,346', '1.23e-05', '3')
    """
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


class Axis:
    """From values to places of the viewBox. begin, end: the places of the least and the largest value."""

    def __init__(self, low, high, begin, end, is_log=False):
        if is_log:
            low, high = math.log10(low), math.log10(high)
        if not high > low:
            pad = abs(low) * 0.1 or 1.0
            low, high = low - pad, high + pad
        self.low, self.high = low, high
        self.begin, self.end = begin, end
        self.is_log = is_log

    def __call__(self, value):
        if self.is_log:
            value = math.log10(value)
        return self.begin + (value - self.low) / (self.high - self.low) * (self.end - self.begin)

    def ticks(self):
        if not self.is_log:
            return ticks(self.low, self.high)
        return [10.0 ** power for power in range(math.ceil(self.low - 1e-9), math.floor(self.high + 1e-9) + 1)]


class Charts:
    """The charts of a page, which share one script and the data that it reads."""

    def __init__(self):
        self.shown = []                         # of each chart of lines what hovering it tells

    def data(self):
        """The data of all charts so far, for the end of a page's body."""
        return data_block("charts", self.shown)

    def lines(self, title, note, series, from_zero=False):
        """{name: [(step, value)]} -> a figure; "" without a point. Values that are not finite have no point.

        note: what the values are. from_zero: the axis holds 0; else lines of positive values that span a factor of 50
        stand on a logarithmic axis.
        """
        kept = {}
        numbers = []                            # of the kept ones: a name has one colour in charts of the same names
        for number, (name, points) in enumerate(series.items()):
            points = thinned([(step, value) for step, value in points if value is not None and math.isfinite(value)])
            if points:
                kept[name] = points
                numbers.append(number)
        if not kept:
            return ""
        steps = [step for points in kept.values() for step, _ in points]
        values = [value for points in kept.values() for _, value in points]
        low, high = min(values), max(values)
        is_log = not from_zero and low > 0 and high > 50 * low
        if from_zero:
            low, high = min(0.0, low), max(0.0, high)
        x = Axis(min(steps), max(steps), LEFT, RIGHT)
        y = Axis(low, high, BOTTOM, TOP, is_log)
        inside = [_grid(x, y)]
        for number, (name, points) in zip(numbers, kept.items()):
            inside.append(_line(number, name, points, x, y))
        inside.append(f'<line class="cursor" y1="{TOP}" y2="{BOTTOM}" x1="0" x2="0" visibility="hidden"/>')
        self.shown.append({
            "low": x.low, "high": x.high, "left": LEFT, "right": RIGHT, "width": WIDTH,
            "series": [{"name": name, "points": points} for name, points in kept.items()]})
        if is_log:
            note = f"{note}; logarithmic axis"
        last = ", ".join(f"{name} {short(points[-1][1])}" for name, points in kept.items())
        legend = _legend(zip(numbers, kept)) if len(series) > 1 else ""
        return _figure(title, note, legend, inside,
                       f'tabindex="0" data-chart="{len(self.shown) - 1}" aria-label="{escape(title)}, last: '
                       f'{escape(last)}"')

    @staticmethod
    def shares(title, note, rows):
        """Rows with method, split, value, low, high, shares in [0, 1] -> a figure with their intervals, a method a
        shape; "" without rows."""
        return _dots(title, note, rows, Axis(0.0, 1.0, BOTTOM, TOP), 1, "{:.3f}")

    @staticmethod
    def differences(title, note, rows):
        """As `shares`, of differences of shares, in points around a line at 0."""
        ends = [0.0]
        for row in rows:
            ends += [100 * end for end in (row["value"], row.get("low"), row.get("high"))
                     if end is not None and math.isfinite(end)]
        reach = 1.05 * max(map(abs, ends)) or 1.0
        return _dots(title, note, rows, Axis(-reach, reach, BOTTOM, TOP), 100, "{:+.1f}")

    STYLE = """
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); gap: 1em }
.charts.big { grid-template-columns: repeat(auto-fill, minmax(480px, 1fr)) }
@media (max-width: 560px) { .charts, .charts.big { grid-template-columns: 1fr } }
figure { margin: 0; position: relative; background: var(--card); border: 1px solid var(--line); border-radius: 6px;
         padding: .6em .7em }
figcaption b { display: block; overflow-wrap: anywhere }
svg { width: 100%; height: auto; display: block; overflow: visible }
svg .grid { stroke: var(--line); stroke-width: 1 }
svg .label { fill: var(--quiet); font-size: 12px }
svg .zero { stroke: var(--ink); stroke-width: 1.2 }
svg .cursor { stroke: var(--ink); stroke-width: 1 }
svg .raw { fill: none; stroke-width: 1; opacity: .35 }
svg .line { fill: none; stroke-width: 2.2; stroke-linejoin: round }
svg .whisker { stroke-width: 2 }
.legend { display: flex; flex-wrap: wrap; gap: .1em 1em; font-size: .84em; margin: .2em 0 }
.legend svg { display: inline-block; width: 26px; height: 12px; vertical-align: middle; margin-right: .3em }
.tip { position: absolute; top: 3.4em; z-index: 2; pointer-events: none; background: var(--card); color: var(--ink);
       border: 1px solid var(--quiet); border-radius: 4px; padding: .3em .6em; font-size: .84em; white-space: pre;
       max-width: 75%; overflow: hidden }
""" + "".join(f".c{k} {{ stroke: var(--s{k}); fill: var(--s{k}) }}\n" for k in range(SERIES))

    SCRIPT = """
'use strict';
const charts = JSON.parse(document.getElementById('charts').textContent);
function text(value) {
  const size = Math.abs(value);
  if (size && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
  return String(+value.toPrecision(4));
}
for (const figure of document.querySelectorAll('figure[data-chart]')) {
  const chart = charts[figure.dataset.chart];
  const svg = figure.querySelector('svg.plot');
  const cursor = svg.querySelector('.cursor');
  const tip = document.createElement('div');
  tip.className = 'tip';
  tip.hidden = true;
  figure.append(tip);
  let at = null;
  const nearest = (points, step) => points.reduce(
    (best, point) => Math.abs(point[0] - step) < Math.abs(best[0] - step) ? point : best);
  const every = [...new Set(chart.series.flatMap(one => one.points.map(point => point[0])))].sort((a, b) => a - b);
  function show(step) {
    at = nearest(every.map(one => [one]), step)[0];
    const place = chart.left + (at - chart.low) / (chart.high - chart.low) * (chart.right - chart.left);
    cursor.setAttribute('x1', place);
    cursor.setAttribute('x2', place);
    cursor.setAttribute('visibility', 'visible');
    const rows = ['step ' + text(at)];
    for (const one of chart.series) rows.push(one.name + '  ' + text(nearest(one.points, at)[1]));
    tip.textContent = rows.join('\\n');
    tip.hidden = false;
    const share = place / chart.width;
    tip.style.left = share < .5 ? 100 * share + 3 + '%' : 'auto';
    tip.style.right = share < .5 ? 'auto' : 103 - 100 * share + '%';
  }
  function hide() { tip.hidden = true; cursor.setAttribute('visibility', 'hidden'); at = null; }
  svg.addEventListener('pointermove', event => {
    const box = svg.getBoundingClientRect();
    const place = (event.clientX - box.left) / box.width * chart.width;
    show(chart.low + (place - chart.left) / (chart.right - chart.left) * (chart.high - chart.low));
  });
  svg.addEventListener('pointerleave', hide);
  figure.addEventListener('blur', hide);
  figure.addEventListener('keydown', event => {
    const turn = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (event.key === 'Escape') hide();
    if (!turn) return;
    event.preventDefault();
    const place = at === null ? (turn > 0 ? -1 : every.length) : every.indexOf(at);
    show(every[Math.min(every.length - 1, Math.max(0, place + turn))]);
  });
}
"""


def _figure(title, note, legend, inside, attributes):
    return (f'<figure {attributes}><figcaption><b>{escape(title)}</b><span class="quiet">{escape(note)}</span>'
            f'</figcaption>{legend}<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}">{"".join(inside)}</svg></figure>')


def _levels(y):
    """The horizontal lines of a chart and what they stand for."""
    parts = []
    for value in y.ticks():
        place = f"{y(value):.1f}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{place}" y2="{place}"/>'
                     f'<text class="label" x="{LEFT - 6}" y="{place}" dy="4" text-anchor="end">{short(value)}</text>')
    return "".join(parts)


def _grid(x, y):
    parts = [_levels(y)]
    for value in x.ticks():
        if value == int(value):
            parts.append(f'<text class="label" x="{x(value):.1f}" y="{BOTTOM + 16}" text-anchor="middle">'
                         f'{short(value)}</text>')
    return "".join(parts)


def _line(number, name, points, x, y):
    """A series: its values thin, their moving average thick; one value alone is a dot."""
    hue = f"c{number % SERIES}"
    title = f"<title>{escape(name)}</title>"
    if len(points) == 1:
        [(step, value)] = points
        return f'<circle class="{hue}" cx="{x(step):.1f}" cy="{y(value):.1f}" r="3">{title}</circle>'
    raw = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
    means = smoothed(np.array([value for _, value in points]))
    smooth = " ".join(f"{x(step):.1f},{y(float(value)):.1f}" for (step, _), value in zip(points, means))
    # A style, since the class that gives the colour also fills.
    style = 'style="fill:none"'
    return (f'<g><polyline class="raw {hue}" {style} points="{raw}"/><polyline class="line {hue}" {style} '
            f'stroke-dasharray="{DASHES[number % len(DASHES)]}" points="{smooth}"/>{title}</g>')


def _legend(numbered, shapes=False):
    """[(number, name)] -> the signs of series, and their names."""
    parts = []
    for number, name in numbered:
        hue = f"c{number % SERIES}"
        if shapes:
            sign = _shape(number, 13, 6)
        else:
            sign = (f'<line class="{hue}" x1="0" x2="26" y1="6" y2="6" stroke-width="2.5" '
                    f'stroke-dasharray="{DASHES[number % len(DASHES)]}"/>')
        parts.append(f'<span><svg viewBox="0 0 26 12">{sign}</svg>{escape(name)}</span>')
    return f'<div class="legend">{"".join(parts)}</div>'


# Outlines around (0, 0): square, triangles, diamond, cross, bar, hexagon; the first series is a circle.
SHAPES = ((), ((-4, -4), (4, -4), (4, 4), (-4, 4)), ((0, -5), (5, 4), (-5, 4)), ((0, -6), (5, 0), (0, 6), (-5, 0)),
          ((0, 5), (5, -4), (-5, -4)), ((-1.5, -5), (1.5, -5), (1.5, 5), (-1.5, 5)),
          ((-5, -1.5), (5, -1.5), (5, 1.5), (-5, 1.5)), ((-5, 0), (-2.5, -4.5), (2.5, -4.5), (5, 0), (2.5, 4.5),
                                                         (-2.5, 4.5)))


def _shape(number, x, y):
    hue = f"c{number % SERIES}"
    outline = SHAPES[number % len(SHAPES)]
    if not outline:
        return f'<circle class="{hue}" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>'
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in outline)
    return f'<polygon class="{hue}" points="{points}"/>'


def _dots(title, note, rows, y, scale, form):
    """The figure of `shares` and `differences`; scale: what values are multiplied with; form: how they are written."""
    if not rows:
        return ""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    splits = list(dict.fromkeys(row["split"] for row in rows))
    slot = (RIGHT - LEFT) / len(splits)
    gap = 0.8 * slot / max(4, len(methods))
    inside = [_levels(y)]
    if y.low < 0:
        inside.append(f'<line class="zero" x1="{LEFT}" x2="{RIGHT}" y1="{y(0):.1f}" y2="{y(0):.1f}"/>')
    for number, split in enumerate(splits):
        middle = LEFT + (number + 0.5) * slot
        inside.append(f'<text class="label" x="{middle:.1f}" y="{BOTTOM + 16}" text-anchor="middle">'
                      f'{escape(split)}</text>')
    for row in rows:
        number = methods.index(row["method"])
        middle = LEFT + (splits.index(row["split"]) + 0.5) * slot
        inside.append(_point(number, row, middle + (number - (len(methods) - 1) / 2) * gap, y, scale, form))
    legend = _legend(enumerate(methods), shapes=True)
    return _figure(title, note, legend, inside, f'role="img" aria-label="{escape(title)}"')


def _point(number, row, x, y, scale, form):
    """A value with its interval, cut to the axis; an interval that is infinite, or missing, is not drawn."""
    hue = f"c{number % SERIES}"
    value = scale * row["value"]
    words = f"{row['method']} on {row['split']}: {form.format(value)}"
    whisker = ""
    ends = (row.get("low"), row.get("high"))
    if all(end is not None and math.isfinite(end) for end in ends):
        low, high = (min(y.high, max(y.low, scale * end)) for end in ends)
        words += f" [{form.format(low)}, {form.format(high)}]"
        whisker = (f'<line class="whisker {hue}" x1="{x:.1f}" x2="{x:.1f}" y1="{y(low):.1f}" y2="{y(high):.1f}"/>')
    return f'<g><title>{escape(words)}</title>{whisker}{_shape(number, x, y(value))}</g>'
