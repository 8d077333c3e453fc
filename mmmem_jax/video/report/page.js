"use strict";
// Selecting, moving by keys, and zooming. Without it the page still shows everything.

const rowOf = (item) => document.getElementById(item.dataset.row ?? `${item.id}-row`);

// The panel says what the row of the table says: its head, then a list of its other cells.
function select(item) {
  const board = item.closest(".board");
  for (const other of board.querySelectorAll('.item[aria-pressed="true"]')) {
    other.setAttribute("aria-pressed", "false");
  }
  item.setAttribute("aria-pressed", "true");
  for (const edge of board.querySelectorAll(".edge")) {
    edge.classList.toggle("on", edge.dataset.ends.split(" ").includes(item.dataset.slot));
  }
  const row = rowOf(item);
  const names = row.closest("table").querySelectorAll("thead th");
  const title = document.createElement("h4");
  title.textContent = row.cells[0].textContent;
  const list = document.createElement("dl");
  for (let i = 1; i < row.cells.length; i++) {
    const cell = row.cells[i];
    if (!cell.textContent.trim() && !cell.querySelector("svg")) continue;
    const name = document.createElement("dt");
    name.textContent = names[i].textContent;
    const value = document.createElement("dd");
    value.append(...[...cell.childNodes].map((node) => node.cloneNode(true)));
    list.append(name, value);
  }
  board.querySelector(".panel").replaceChildren(title, list);
}

// An item's own box also counts what its bar cuts off; that of its ring does not.
function focusOn(item) {
  item.focus({ preventScroll: true });
  item.querySelector(".ring").scrollIntoView({ block: "nearest", inline: "nearest" });
}

// The item of another lane that begins nearest to this one.
function across(item, step) {
  const lanes = [...item.closest(".board").querySelectorAll(".lane:has(.item)")];
  const lane = lanes[lanes.indexOf(item.closest(".lane")) + step];
  if (!lane) return null;
  const away = (other) => Math.abs(other.dataset.time - item.dataset.time);
  return [...lane.querySelectorAll(".item")].reduce((a, b) => (away(b) < away(a) ? b : a));
}

function neighbour(item, key) {
  if (key === "ArrowUp") return across(item, -1);
  if (key === "ArrowDown") return across(item, 1);
  const items = [...item.closest(".lane").querySelectorAll(".item")];
  const at = items.indexOf(item);
  return { ArrowLeft: items[at - 1], ArrowRight: items[at + 1], Home: items[0], End: items.at(-1) }[key];
}

const NARROWEST = 0.2; // percent of the time line, as the page is drawn
const MINUTE = 60, HOUR = 3600, DAY = 86400;
const STEPS = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, HOUR, 2 * HOUR, 3 * HOUR, 6 * HOUR, 12 * HOUR, DAY, 7 * DAY];

function clock(t) {
  const two = (n) => String(n).padStart(2, "0");
  const [day, hours, minutes] = [Math.floor(t / DAY), Math.floor((t % DAY) / HOUR), Math.floor((t % HOUR) / MINUTE)];
  const rest = `${two(minutes)}:${two(t % MINUTE)}`;
  if (day) return `day ${day + 1}, ${hours}:${rest}`;
  return hours ? `${hours}:${rest}` : `${minutes}:${two(t % MINUTE)}`;
}

function drawn(svg, name, attributes) {
  const made = document.createElementNS(svg.namespaceURI, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

// Ticks of what is seen of the time line and a screen beside it, names where their bars are seen.
function refresh(board) {
  const scroll = board.querySelector(".scroll");
  const axis = board.querySelector(".axis");
  const duration = Number(axis.dataset.duration);
  const width = axis.getBoundingClientRect().width;
  const step = STEPS.find((s) => (s / duration) * width >= 110) ?? 28 * DAY;
  const seen = (x) => (x / width) * duration;
  const first = Math.max(0, Math.floor(seen(scroll.scrollLeft - scroll.clientWidth) / step));
  const last = Math.min(duration, seen(scroll.scrollLeft + 2 * scroll.clientWidth)) / step;
  axis.replaceChildren();
  for (let i = first; i <= last; i++) {
    const x = ((i * step) / duration) * width;
    const label = drawn(axis, "text", { x, y: 17, class: i ? (x > width - 40 ? "end" : "") : "start" });
    label.textContent = clock(i * step);
    axis.append(drawn(axis, "line", { x1: x, x2: x, y1: 0, y2: 5 }), label);
  }
  const left = scroll.getBoundingClientRect().left;
  const names = [...board.querySelectorAll(".lane:not(.sensory) text")].map((name) => {
    const box = name.parentElement.querySelector(".ring").getBoundingClientRect();
    return { name, x: Math.max(0, left - box.left) + 5, room: box.width - 6, needs: (name.needs ??= name.getComputedTextLength()) };
  });
  for (const { name, x, room, needs } of names) {
    name.setAttribute("x", x);
    name.style.visibility = needs <= room ? "visible" : "hidden";
  }
}

// Zooms about the item that has the focus or is selected, else about the middle; 0 fits.
function zoom(board, by) {
  const scroll = board.querySelector(".scroll");
  const old = Number(board.dataset.zoom ?? 1);
  const now = by ? Math.min(Math.max(old * by, 1), Number(board.dataset.max)) : 1;
  const anchor = board.querySelector(".item:focus") ?? board.querySelector('.item[aria-pressed="true"]');
  const box = anchor?.querySelector(".ring").getBoundingClientRect();
  const at = box ? box.left - scroll.getBoundingClientRect().left : scroll.clientWidth / 2;
  const share = (scroll.scrollLeft + at) / scroll.scrollWidth;
  board.dataset.zoom = now;
  board.style.setProperty("--zoom", now);
  board.querySelector("output").textContent = `×${now}`;
  for (const narrow of board.querySelectorAll("svg[data-width]")) {
    narrow.setAttribute("width", `${Math.max(narrow.dataset.width, NARROWEST / now)}%`);
  }
  scroll.scrollLeft = share * scroll.scrollWidth - scroll.clientWidth / 2;
  refresh(board);
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-zoom-by]");
  if (button) zoom(button.closest(".board"), Number(button.dataset.zoomBy));
  const item = event.target.closest(".item");
  if (item) select(item);
  const link = event.target.closest('a[href^="#"]');
  const target = link && document.getElementById(link.hash.slice(1));
  if (target?.matches(".item")) {
    event.preventDefault();
    select(target);
    focusOn(target);
  }
});

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const board = event.target.closest?.(".board[data-max]");
  const by = { "+": 2, "=": 2, "-": 0.5, 0: 0 }[event.key];
  if (board && by !== undefined) {
    zoom(board, by);
    event.preventDefault();
  }
  const item = event.target.closest?.(".item");
  if (!item) return;
  if (event.key === "Enter" || event.key === " ") {
    select(item);
    event.preventDefault();
  } else if (["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Home", "End"].includes(event.key)) {
    const next = neighbour(item, event.key);
    if (next) focusOn(next);
    event.preventDefault();
  }
});

for (const board of document.querySelectorAll(".board[data-max]")) {
  board.querySelector(".controls").hidden = false;
  board.querySelector(".scroll").addEventListener("scroll", () => refresh(board), { passive: true });
  new ResizeObserver(() => refresh(board)).observe(board);
}
