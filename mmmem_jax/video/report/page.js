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

function focusOn(item) {
  item.focus();
  item.scrollIntoView({ block: "nearest", inline: "nearest" });
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

// Zooms about the item that has the focus or is selected, else about the middle; 0 fits.
function zoom(board, by) {
  const scroll = board.querySelector(".scroll");
  const old = Number(board.dataset.zoom ?? 1);
  const now = by ? Math.min(Math.max(old * by, 1), Number(board.dataset.max)) : 1;
  const anchor = board.querySelector(".item:focus") ?? board.querySelector('.item[aria-pressed="true"]');
  const left = scroll.getBoundingClientRect().left;
  const box = anchor?.getBoundingClientRect();
  const middle = box ? box.left - left + scroll.scrollLeft : scroll.scrollLeft + scroll.clientWidth / 2;
  const share = middle / scroll.scrollWidth;
  board.dataset.zoom = now;
  board.style.setProperty("--zoom", now);
  board.querySelector("output").textContent = `×${now}`;
  for (const tick of board.querySelectorAll(".tick")) {
    tick.classList.toggle("shown", Number(tick.dataset.zoom) <= now);
  }
  scroll.scrollLeft = share * scroll.scrollWidth - scroll.clientWidth / 2;
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

for (const controls of document.querySelectorAll(".controls")) controls.hidden = false;
