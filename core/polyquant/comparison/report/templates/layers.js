// The layers of one candidate: a heat map of blocks by kinds of modules, and every tensor in a table.
const chooser = document.getElementById("layered");
const MEASURES = {
  errors: {title: "error", text: (value) => value === null ? "not measured" : `${figure(100 * value)} %`, format: ".2~p"},
  bits: {title: "bits", text: (value) => figure(value), format: ".3~g"},
  bytes: {title: "bytes", text: mebibytes, format: ".3~s"},
};

// model.layers.3.mlp.experts.7.w1.weight: block 3, kind mlp.experts.*.w1; none outside the blocks.
function place(name) {
  const found = /^(?:.*?\.)?(\d+)\.(.+?)(?:\.weight)?$/.exec(name);
  return found && {block: Number(found[1]), kind: found[2].replace(/(^|\.)\d+(?=\.|$)/g, "$1*")};
}

function tensors() {
  const of = data.layers.of[chooser.value], names = data.layers.names[of.names], shapes = data.layers.shapes[of.shapes];
  return names.map((name, index) => ({
    name, place: place(name), shape: shapes[index], scheme: data.layers.schemes[of.schemes[index]], bits: of.bits[index],
    bytes: of.bytes[index], quantized: of.quantized[index], errors: of.errors[index],
  }));
}

function heat() {
  const measure = document.querySelector("#measure input:checked").value, of = MEASURES[measure], all = tensors();
  const blocks = new Map();
  for (const tensor of all.filter((each) => each.place)) {
    const key = JSON.stringify([tensor.place.kind, tensor.place.block]);
    blocks.set(key, [...(blocks.get(key) ?? []), tensor]);
  }
  const kinds = [...new Set(all.flatMap((each) => each.place ? [each.place.kind] : []))];
  const numbers = [...new Set(all.flatMap((each) => each.place ? [each.place.block] : []))].sort((one, other) => one - other);
  const cell = (kind, block) => blocks.get(JSON.stringify([kind, block])) ?? [];
  const value = (group) => { // of several experts: bytes together, bits and errors as their mean
    const known = group.map((each) => each[measure]).filter((each) => each !== null);
    const sum = known.reduce((one, other) => one + other, 0);
    return known.length ? measure === "bytes" ? sum : sum / known.length : null;
  };
  const text = (kind, block) => {
    const group = cell(kind, block);
    if (!group.length) return "";
    const mean = group.length > 1 ? [`${group.length} tensors, mean`] : [];
    return [`<b>block ${block}, ${plain(kind)}</b>`, ...mean, plain(group[0].scheme), `${figure(group[0].bits)} bits a weight`,
      mebibytes(group.reduce((sum, each) => sum + each.bytes, 0)), ...(group[0].errors === null ? [] : [`error ${figure(100 * group.reduce((sum, each) => sum + each.errors, 0) / group.length)} %`])].join("<br>");
  };
  const target = document.getElementById("heat"), wide = !narrow();
  const z = kinds.map((kind) => numbers.map((block) => value(cell(kind, block))));
  Plotly.react(target, [{
    type: "heatmap", x: numbers, y: kinds.map(plain), z, text: kinds.map((kind) => numbers.map((block) => text(kind, block))),
    hovertemplate: "%{text}<extra></extra>", colorscale: "Cividis", xgap: 1, ygap: 1, hoverongaps: false,
    colorbar: {title: {text: of.title, side: "top"}, thickness: 10, len: 1, nticks: 6, outlinewidth: 0, tickformat: of.format, xpad: 6},
  }], {
    height: 60 + Math.max(kinds.length, 4) * 30, margin: {l: wide ? 150 : 112, r: 8, t: 8, b: 44}, paper_bgcolor: "transparent", plot_bgcolor: "transparent",
    font: {family: font, size: wide ? 12 : 10}, dragmode: false, hovermode: "closest",
    xaxis: {title: {text: "block", standoff: 6}, tick0: 0, dtick: Math.ceil(numbers.length / (wide ? 16 : 6)), fixedrange: true, showgrid: false, zeroline: false, ticks: ""}, yaxis: {autorange: "reversed", ticks: "", ticklabelstandoff: 6, fixedrange: true, showgrid: false, type: "category"},
  }, CONFIG);
  summary(all);
  rows(all);
}

function summary(all) {
  const quantized = all.filter((each) => each.quantized), bytes = (group) => mebibytes(group.reduce((sum, each) => sum + each.bytes, 0));
  const dense = all.filter((each) => !each.quantized), known = all.filter((each) => each.errors !== null);
  const worst = [...known].sort((one, other) => other.errors - one.errors).slice(0, 3);
  document.getElementById("layer-summary").textContent = [
    `${quantized.length} tensors quantized, ${bytes(quantized)}; ${dense.length} dense, ${bytes(dense)}.`,
    ...(worst.length ? [`Largest errors: ${worst.map((each) => `${each.name} ${figure(100 * each.errors)} %`).join(", ")}.`] : ["No errors were measured."]),
  ].join(" ");
}

function rows(all) {
  document.querySelector("#tensors tbody").replaceChildren(...all.map((each) => {
    const row = document.createElement("tr"), name = document.createElement("th");
    name.scope = "row";
    name.className = "name";
    name.textContent = each.name;
    row.append(name, ...[each.shape.join(" x "), each.scheme, figure(each.bits), each.bytes.toLocaleString("en"), each.errors === null ? "" : `${figure(100 * each.errors)} %`].map((text) => {
      const cell = document.createElement("td");
      cell.textContent = text;
      return cell;
    }));
    return row;
  }));
}

if (chooser) {
  chooser.addEventListener("input", heat);
  document.getElementById("measure").addEventListener("change", heat);
  heat();
}
