"use strict";

// Tables sort by a click on a column's name: by number where a cell has one, by its words where not.
const words = new Intl.Collator("en", { numeric: true });
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  if (body.rows.length < 2) continue;
  for (const head of table.tHead.querySelectorAll("th")) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const falling = head.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", falling ? "descending" : "ascending");
      const rows = Array.from(body.rows, (row) => {
        const cell = row.cells[head.cellIndex];
        return { row, number: parseFloat(cell.dataset.value), text: cell.textContent };
      });
      rows.sort((a, b) => {
        const unknown = Number.isNaN(a.number) - Number.isNaN(b.number);  // what is not known comes last, either way
        const order = Number.isNaN(a.number) ? words.compare(a.text, b.text) : a.number - b.number;
        return unknown || (falling ? -order : order);
      });
      body.append(...rows.map(({ row }) => row));
    });
  }
}

// A curve's point says what it is under the pointer, at a touch, and with the keyboard's focus.
const tip = document.createElement("div");
tip.className = "tip";
tip.hidden = true;
tip.setAttribute("aria-hidden", "true");  // the point itself has the words as its name
document.body.append(tip);
const hide = () => { tip.hidden = true; };
for (const point of document.querySelectorAll(".point")) {
  point.querySelector("title").remove();
  const show = () => {
    tip.textContent = point.getAttribute("aria-label");
    tip.hidden = false;
    const box = point.getBoundingClientRect();
    const left = box.left + box.width / 2 - tip.offsetWidth / 2;
    const most = document.documentElement.clientWidth - tip.offsetWidth - 8;
    const above = box.top - tip.offsetHeight - 8;
    tip.style.left = `${window.scrollX + Math.max(8, Math.min(left, most))}px`;
    tip.style.top = `${window.scrollY + (above < 0 ? box.bottom + 8 : above)}px`;
  };
  for (const event of ["pointerenter", "focus", "click"]) point.addEventListener(event, show);
  for (const event of ["pointerleave", "blur"]) point.addEventListener(event, hide);
}
document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });

// Paper shows what a reader would have opened.
let opened = [];
window.addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not([open])")];
  for (const item of opened) item.open = true;
});
window.addEventListener("afterprint", () => { for (const item of opened) item.open = false; });
