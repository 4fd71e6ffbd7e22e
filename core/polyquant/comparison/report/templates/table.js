// Sorting, filtering, rows that open, commands that copy.
const table = document.getElementById("table");
const bodies = [...table.tBodies];

function sort(column, ascending) {
  const value = (body) => body.rows[0].cells[column].dataset.value;
  const numeric = bodies.every((body) => value(body) === "" || !Number.isNaN(Number(value(body))));
  const compare = (one, other) => numeric ? Number(value(one)) - Number(value(other)) : value(one).localeCompare(value(other), "en", {numeric: true});
  const [known, blank] = [bodies.filter((body) => value(body) !== ""), bodies.filter((body) => value(body) === "")];
  known.sort((one, other) => ascending ? compare(one, other) : compare(other, one));
  table.append(...known, ...blank);
  [...table.tHead.rows[0].cells].forEach((heading, index) =>
    index === column ? heading.setAttribute("aria-sort", ascending ? "ascending" : "descending") : heading.removeAttribute("aria-sort"));
}

function filter() {
  const words = document.getElementById("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const backend = document.getElementById("backend").value, only = document.getElementById("only").checked;
  const frontiers = new Set(Object.values(data.frontiers).flat());
  shown = new Set();
  for (const body of bodies) {
    const index = Number(body.dataset.index);
    const fits = words.every((word) => body.dataset.searched.includes(word)) && (!backend || body.dataset.backend === backend) && (!only || frontiers.has(index));
    body.hidden = !fits;
    if (fits) shown.add(index);
  }
  document.getElementById("shown").textContent = shown.size === bodies.length ? `${bodies.length} candidates` : `${shown.size} of ${bodies.length} candidates`;
  draw();
}

function open(body, wanted) {
  const button = body.querySelector(".open"), more = body.querySelector(".more");
  const now = wanted ?? button.getAttribute("aria-expanded") !== "true";
  button.setAttribute("aria-expanded", now);
  more.classList.toggle("shown", now);
}

function show(index) {
  const body = document.getElementById(`row-${index}`);
  if (!body) return;
  if (body.hidden) {
    document.getElementById("filter").value = document.getElementById("backend").value = "";
    document.getElementById("only").checked = false;
    filter();
  }
  document.querySelectorAll(".target").forEach((other) => other.classList.remove("target"));
  body.classList.add("target");
  open(body, true);
  body.scrollIntoView({block: "center"});
}

async function copy(button) {
  const code = button.previousElementSibling;
  try {
    await navigator.clipboard.writeText(code.textContent);
    button.textContent = "copied";
  } catch { // a browser that denies it to local files: selected, for Ctrl-C
    getSelection().selectAllChildren(code);
    button.textContent = document.execCommand("copy") ? "copied" : "selected";
  }
  setTimeout(() => { button.textContent = "copy"; }, 1500);
}

table.tHead.addEventListener("click", (event) => {
  const heading = event.target.closest("th");
  if (heading) sort(heading.cellIndex, heading.getAttribute("aria-sort") !== "ascending");
});
table.addEventListener("click", (event) => {
  const button = event.target.closest(".open");
  if (button) open(button.closest("tbody"));
});
document.addEventListener("click", (event) => {
  const link = event.target.closest('a[href^="#row-"]'), button = event.target.closest(".copy");
  if (button) copy(button);
  if (link) {
    event.preventDefault();
    show(Number(link.hash.slice(5)));
  }
});
for (const id of ["filter", "backend", "only"]) document.getElementById(id).addEventListener("input", filter);
filter();
if (location.hash.startsWith("#row-")) show(Number(location.hash.slice(5)));
