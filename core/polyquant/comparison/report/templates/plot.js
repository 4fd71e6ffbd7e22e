// Distance from the reference against size or speed. What plotly draws of the data goes through `plain`: it reads tags.
const data = JSON.parse(document.getElementById("data").textContent);
const ZERO = 1e-6; // nats: as close as the reference is to itself
const GROUPS = {
  low: {name: "up to 3.5 bits", symbol: "triangle-up", color: "#d4720b"},
  middle: {name: "3.5 to 6 bits", symbol: "circle", color: "#3183d6"},
  high: {name: "over 6 bits", symbol: "square", color: "#1a9a72"},
  dense: {name: "dense", symbol: "diamond", color: "#868e98"},
};
const BIG = Math.max(...data.points.map((point) => point.weights_stored_bytes ?? 0)) >= 2 ** 32;
const AXES = Object.fromEntries(Object.entries(data.axes).map(([key, {title, better, error, bytes}]) => [key, {
  title: `${title}${bytes ? BIG ? ", GiB" : ", MiB" : ""} (${better === "lower" ? "smaller" : "more"} is better)`,
  scale: bytes ? 1 / 2 ** (BIG ? 30 : 20) : 1, better, error,
}]));
const CONFIG = {responsive: true, displayModeBar: false, doubleClick: "reset"};
const plain = (text) => String(text).replace(/[&<>]/g, (sign) => ({"&": "&amp;", "<": "&lt;", ">": "&gt;"})[sign]);
const figure = (value, digits = 3) => value === null || value === undefined ? "not measured" : Number(value.toPrecision(digits)).toLocaleString("en", {maximumSignificantDigits: digits});
const mebibytes = (bytes) => bytes === null ? "not measured" : bytes < 1024 * 2 ** 20 ? `${(bytes / 2 ** 20).toFixed(1)} MiB` : `${(bytes / 2 ** 30).toFixed(2)} GiB`;
const narrow = () => document.getElementById("plot").clientWidth < 600;
const touch = matchMedia("(pointer: coarse)").matches;
const font = getComputedStyle(document.body).fontFamily;
const HIGHEST = 6000; // pixels
let shown = new Set(data.points.keys()), drawing = null;

const hover = ({candidate, status, texts: {kl_mean, top1, weights_stored_bytes, ratio_to_bfloat16, generated_tokens_per_second, prompt_tokens_per_second}}) => [`<b>${plain(candidate)}</b>`, ...[
  kl_mean && `KL ${kl_mean} nats`, top1 && `top-1 ${top1}`, weights_stored_bytes && `stored ${weights_stored_bytes}, ${ratio_to_bfloat16} bfloat16`,
  generated_tokens_per_second && `generated ${generated_tokens_per_second} tokens/s`, prompt_tokens_per_second && `prompt ${prompt_tokens_per_second} tokens/s`,
  status !== "done" && status,
].filter(Boolean).map(plain)].join("<br>");

function ticks(low, high) {
  const steps = high / low > 30 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 5, 7];
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
    for (const step of steps) {
      const tick = step * 10 ** power;
      if (tick >= low && tick <= high) found.push(tick);
    }
  return found;
}

function draw() {
  const axis = document.querySelector("#axis input:checked").value, of = AXES[axis];
  const drawn = data.points.map((point, index) => ({...point, index})).filter((point) => point[axis] !== null && point.kl_mean !== null);
  const missing = data.points.filter((point) => point[axis] === null || point.kl_mean === null);
  const target = document.getElementById("plot");
  document.getElementById("unplotted").textContent = missing.length ? `Not in this plot: ${missing.map((point) =>
    `${point.candidate} (${point.status === "done" ? "not measured for it" : point.status})`).join(", ")}.` : "";
  if (!drawn.length) {
    drawing = null;
    Plotly.purge(target);
    target.textContent = "No candidate has both figures of this plot.";
    list([]);
    return;
  }
  const positive = drawn.map((point) => point.kl_mean).filter((kl) => kl >= ZERO);
  const lowest = positive.length ? Math.min(...positive) : 1, floor = lowest / 4;
  const y = (point) => Math.max(point.kl_mean, floor), x = (point) => point[axis] * of.scale;
  const xs = drawn.map(x), low = Math.min(...xs), high = Math.max(...xs), log = high / low > 4;
  const line = data.frontiers[axis].map((index) => data.points[index]);
  const traces = [{x: line.map(x), y: line.map(y), mode: "lines", hoverinfo: "skip", name: "frontier",
    line: {shape: of.better === "lower" ? "hv" : "vh", width: 1.2, dash: "dot", color: "#868e98"}}];
  const onLine = new Set(data.frontiers[axis]);
  for (const [name, group] of Object.entries(GROUPS)) {
    const points = drawn.filter((point) => point.group === name);
    if (!points.length) continue;
    const bad = (point) => point.status !== "done";
    traces.push({
      x: points.map(x), y: points.map(y), mode: "markers", showlegend: false, customdata: points.map((point) => point.index),
      text: points.map(hover), hovertemplate: "%{text}<extra></extra>",
      marker: {size: points.map((point) => onLine.has(point.index) ? 11 : 8), color: group.color, line: {width: 1.5, color: group.color},
        symbol: points.map((point) => group.symbol + (bad(point) ? "-open" : "")),
        opacity: points.map((point) => !shown.has(point.index) ? 0.1 : onLine.has(point.index) || point.reference ? 1 : 0.65)},
      error_y: {type: "data", array: points.map((point) => point.kl_mean < ZERO ? 0 : point.kl_standard_error),
        arrayminus: points.map((point) => point.kl_mean < ZERO ? 0 : Math.min(point.kl_standard_error, y(point) - floor / 2)), color: group.color, thickness: 1, width: 0},
      ...(of.error ? {error_x: {type: "data", array: points.map((point) => point[of.error] * of.scale),
        arrayminus: points.map((point) => Math.min(point[of.error] * of.scale, x(point) * 0.9)), color: group.color, thickness: 1, width: 0}} : {}),
    }, {x: [null], y: [null], mode: "markers", name: group.name, marker: {size: 9, color: group.color, symbol: group.symbol}});
  }
  const wide = !narrow();
  const decades = [];
  for (let power = Math.ceil(Math.log10(lowest)); power <= Math.ceil(Math.log10(Math.max(...positive, 1))); power++) decades.push(10 ** power);
  const zero = drawn.some((point) => point.kl_mean < ZERO) ? [floor] : [];
  const xticks = ticks(low / 1.1, high * 1.1), most = Math.max(...positive, lowest);
  const yticks = most / lowest > 30 ? decades : ticks(lowest / 1.1, most * 1.1);  // within a decade there may be none
  const layout = {
    height: wide ? 480 : 400, margin: {l: wide ? 76 : 60, r: 12, t: 8, b: 52}, hovermode: "closest", dragmode: touch ? false : "zoom",
    paper_bgcolor: "transparent", plot_bgcolor: "transparent", font: {family: font, size: wide ? 13 : 11}, showlegend: true,
    legend: {orientation: "h", y: 1.02, yanchor: "bottom", x: 0, itemclick: false, itemdoubleclick: false},
    xaxis: {title: {text: of.title, standoff: 8}, type: log ? "log" : "linear", zeroline: false, fixedrange: touch,
      ...(log ? {tickvals: xticks, ticktext: xticks.map((tick) => figure(tick))} : {})},
    yaxis: {title: {text: "KL to the reference, nats (lower is better)", standoff: 10}, type: "log", zeroline: false, fixedrange: touch,
      tickvals: [...zero, ...yticks], ticktext: [...zero.map(() => "0"), ...yticks.map((tick) => Number(tick.toPrecision(2))).map((tick) => tick < 1e-3 ? tick.toExponential() : String(tick))]},
  };
  target.querySelectorAll(":scope > :not(.plot-container)").forEach((child) => child.nodeType === 3 && child.remove());
  drawing = {drawn, line, x, y, log, falls: of.better === "lower"};
  Plotly.react(target, traces, layout, CONFIG).then(label);
  target.removeAllListeners("plotly_click");
  target.removeAllListeners("plotly_relayout");
  target.on("plotly_click", (event) => event.points[0]?.customdata !== undefined && show(event.points[0].customdata));
  target.on("plotly_relayout", (changed) => Object.keys(changed).some((key) => /^[xy]axis/.test(key)) && label()); // another view
  list(data.frontiers[axis]);
}

// Every point that is drawn and in view gets its name; the plot grows until all have room.
function label() {
  const target = document.getElementById("plot");
  if (!drawing || !target._fullLayout) return;
  const {drawn, line, x, y, log, falls} = drawing, size = narrow() ? 10 : 12, onLine = new Set(line);
  for (let height = target._fullLayout.height; ; height = Math.round(height * 1.2)) {
    if (height !== target._fullLayout.height) Plotly.relayout(target, {height});
    const {xaxis, yaxis} = target._fullLayout, area = [xaxis._length, yaxis._length];
    const at = (point) => [xaxis.d2p(x(point)), yaxis.d2p(y(point))];
    const inside = ([left, top]) => left >= 0 && top >= 0 && left <= area[0] && top <= area[1];
    const named = drawn.filter((point) => shown.has(point.index) && inside(at(point)));
    const steps = line.slice(1).flatMap((point, index) => {
      const [one, other] = [at(line[index]), at(point)], corner = falls ? [other[0], one[1]] : [one[0], other[1]];
      return [one, other].map((end) => [Math.min(end[0], corner[0]) - 1, Math.min(end[1], corner[1]) - 1, Math.max(end[0], corner[0]) + 1, Math.max(end[1], corner[1]) + 1]);
    });
    const points = named.map((point) => ({at: at(point), bold: onLine.has(data.points[point.index]),
      name: point.candidate + (point.reference ? " (reference)" : point.status === "done" ? "" : ` (${point.status})`)}));
    const places = placed(points, drawn.map(at).filter(inside), steps, area, size, font);
    if (!places && height < HIGHEST) continue;
    Plotly.relayout(target, {annotations: (places ?? []).map(({box, lines, leader}, index) => {
      const {at: [left, top], bold} = points[index], text = lines.map(plain).join("<br>");
      const middle = [(box[0] + box[2]) / 2 - left, (box[1] + box[3]) / 2 - top];
      return {x: log ? Math.log10(x(named[index])) : x(named[index]), y: Math.log10(y(named[index])), text: bold ? `<b>${text}</b>` : text,
        font: {size}, borderpad: 0, xanchor: "center", yanchor: "middle", align: middle[0] > 0 ? "left" : "right",
        ...(leader ? {showarrow: true, arrowhead: 0, arrowwidth: 0.8, arrowcolor: "#868e98", standoff: 6, ax: middle[0], ay: middle[1]}
          : {showarrow: false, xshift: middle[0], yshift: -middle[1]})};
    })});
    return;
  }
}

function list(indices) {
  document.querySelector("#frontier tbody").replaceChildren(...indices.map((index) => {
    const {candidate, texts} = data.points[index], row = document.createElement("tr"), name = document.createElement("th"), link = document.createElement("a");
    name.scope = "row";
    name.className = "name";
    link.href = `#row-${index}`;
    link.textContent = candidate;
    name.append(link);
    row.append(name, ...data.columns.map((key) => {
      const cell = document.createElement("td");
      cell.textContent = texts[key];
      return cell;
    }));
    return row;
  }));
}

document.getElementById("axis").addEventListener("change", draw);
draw();
let last = innerWidth;
addEventListener("resize", () => { if (innerWidth !== last) { last = innerWidth; draw(); } });
addEventListener("beforeprint", () => document.querySelectorAll(".js-plotly-plot").forEach((plot) => Plotly.relayout(plot, {width: 980, autosize: false}).then(label)));
addEventListener("afterprint", () => document.querySelectorAll(".js-plotly-plot").forEach((plot) => Plotly.relayout(plot, {width: null, autosize: true}).then(label)));
