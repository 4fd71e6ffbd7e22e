"use strict";
// Names of the points of a plot: each beside its point, or further off with a line to it; never over another or a mark.
const ruler = document.createElement("canvas").getContext("2d");
const MARK = 7, GAP = 4, STEP = 6; // pixels: half a mark's box, what is kept between two boxes, and between places tried
const CROSSED = {name: 400, mark: 90, leader: 60, line: 25}; // pixels of way that are better gone than crossing one of these

// A name in lines no wider than `widest`: broken after its signs, or inside a word that is wider.
function broken(name, widest) {
  const fits = (text) => ruler.measureText(text).width <= widest;
  const lines = [""];
  for (const piece of name.match(/[^,:=@/\s]*[,:=@/\s]?/g).filter(Boolean).flatMap((word) => fits(word) ? [word] : [...word]))
    if (lines.at(-1) === "" || fits(lines.at(-1) + piece)) lines[lines.length - 1] += piece;
    else lines.push(piece);
  return lines;
}

const apart = (one, other) => one[2] <= other[0] || one[0] >= other[2] || one[3] <= other[1] || one[1] >= other[3];
const grown = ([left, top, right, bottom], by) => [left - by, top - by, right + by, bottom + by];
const nearest = ([left, top, right, bottom], [x, y]) => [Math.min(Math.max(x, left), right), Math.min(Math.max(y, top), bottom)];

// Whether the straight way between two places leads through a box.
function crosses([ax, ay], [bx, by], [left, top, right, bottom]) {
  let from = 0, to = 1;
  for (const [start, way, low, high] of [[ax, bx - ax, left, right], [ay, by - ay, top, bottom]]) {
    if (way === 0) {
      if (start <= low || start >= high) return false;
      continue;
    }
    const [one, other] = [(low - start) / way, (high - start) / way];
    from = Math.max(from, Math.min(one, other));
    to = Math.min(to, Math.max(one, other));
  }
  return from < to;
}

const side = ([ax, ay], [bx, by], [x, y]) => Math.sign((bx - ax) * (y - ay) - (by - ay) * (x - ax));
const cross = ([a, b], [c, d]) => side(a, b, c) !== side(a, b, d) && side(c, d, a) !== side(c, d, b);

// Where the names go, in the order of `points`: {box, lines, leader}; null where the area has no room for all of them.
// points: {at: [left, top], name, bold}, in pixels of the area; marks: places of all marks; lines: boxes better left free.
function placed(points, marks, lines, [width, height], size, family) {
  const boxes = marks.map(([x, y]) => [x - MARK, y - MARK, x + MARK, y + MARK]), names = [], leaders = [];
  const widest = Math.max(90, Math.min(220, width * 0.42)), found = new Map();
  const order = [...points].sort((one, other) => (other.bold - one.bold) || other.at[1] - one.at[1]);
  for (const point of order) {
    ruler.font = `${point.bold ? "bold " : ""}${size}px ${family}`;
    const text = broken(point.name, widest), wide = Math.max(...text.map((line) => ruler.measureText(line).width)) + 2, high = text.length * size * 1.3;
    const [x, y] = point.at, places = [[x + 9, y - high / 2], [x + 8, y - high - 2], [x + 8, y + 2], [x - 9 - wide, y - high / 2], [x - 8 - wide, y - high - 2],
      [x - 8 - wide, y + 2], [x - wide / 2, y - 9 - high], [x - wide / 2, y + 9]].map(([left, top], index) => ({left, top, cost: index}));
    for (let top = 0; top + high <= height; top += STEP) for (let left = 0; left + wide <= width; left += 2 * STEP) places.push({left, top, cost: 20});
    for (const place of places) {
      place.box = [place.left, place.top, place.left + wide, place.top + high];
      const [right, below] = nearest(place.box, point.at);
      place.sum = place.cost + Math.hypot(right - x, below - y);
    }
    places.sort((one, other) => one.sum - other.sum);
    let best = null;
    for (const {left, top, cost, box, sum: least} of places) {
      let sum = least;
      if (best && sum >= best.sum) break;
      if (left < 0 || top < 0 || box[2] > width || box[3] > height) continue;
      const room = grown(box, GAP / 2);
      if (names.some((other) => !apart(room, other)) || boxes.some((mark) => !apart(room, mark))) continue;
      const leader = cost < 20 ? null : [[left + wide / 2, top + high / 2], point.at];
      sum += CROSSED.line * lines.filter((line) => !apart(box, line)).length + CROSSED.name * leaders.filter(([one, other]) => crosses(one, other, room)).length;
      if (leader) {
        sum += CROSSED.name * names.filter((other) => crosses(...leader, other)).length + CROSSED.leader * leaders.filter((other) => cross(leader, other)).length
          + CROSSED.mark * boxes.filter((mark, index) => (marks[index][0] !== x || marks[index][1] !== y) && crosses(...leader, mark)).length;
      }
      if (!best || sum < best.sum) best = {box, lines: text, leader, sum};
    }
    if (!best) return null;
    names.push(best.box);
    if (best.leader) leaders.push(best.leader);
    found.set(point, best);
  }
  return points.map((point) => found.get(point));
}
