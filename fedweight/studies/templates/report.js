"use strict";
// Figures: a specification of Vega-Lite beside each place, drawn as wide as its place.
const MANY = 4000; // marks; beyond, a canvas draws faster than the page's own elements

function specification(place) {
  const spec = JSON.parse(place.parentElement.querySelector(".spec").textContent);
  const width = place.clientWidth;
  spec.background = null;
  if (width < 420) {
    Object.assign(spec.config.legend, { columns: 1, gradientLength: width / 2 });
    spec.config.axis.labelLimit = 80;
  }
  if (spec.vconcat) {
    for (const view of spec.vconcat) view.width = Math.max(width - 80, 120);
  } else {
    spec.width = "container";
    spec.autosize = { type: "fit-x", contains: "padding" };
  }
  return spec;
}

// What is told of one of very many marks is made when it is pointed at, not before.
function toldLate(spec) {
  const view = spec.vconcat ? spec.vconcat.at(-1) : spec;
  const told = view.encoding.tooltip;
  delete view.encoding.tooltip;
  view.mark.tooltip = { content: "data" };
  const number = (value, format) => (format.includes("%")
    ? `${(100 * value).toFixed(1)}%` : String(Number(value.toPrecision(4))));
  const line = ({ field, title, format }, datum, clean) => {
    const value = datum[field];
    const text = typeof value === "number" ? number(value, format || "") : value;
    return `<tr><td class="key">${clean(title || field)}</td><td>${clean(text)}</td></tr>`;
  };
  return (datum, clean) => (datum.round === undefined && datum.s === undefined ? ""
    : `<table>${told.map((one) => line(one, datum, clean)).join("")}</table>`);
}

async function draw(place) {
  const spec = specification(place);
  const options = {
    ast: true, // Expressions are interpreted: the page may not compile any.
    actions: false,
    renderer: "svg",
    tooltip: { theme: "custom" },
  };
  if ((spec.usermeta || {}).marks > MANY) {
    // A canvas has no colours of the page's: cells have their own, texts stay outside it.
    Object.assign(spec.config.axis, { domain: false, ticks: false, grid: false });
    options.renderer = "hybrid";
    options.tooltip.formatTooltip = toldLate(spec);
  }
  const drawn = await vegaEmbed(place, spec, options);
  place.style.minHeight = "";
  return drawn;
}

async function drawAll() {
  if (typeof vegaEmbed === "undefined") return;
  for (const place of document.querySelectorAll(".chart")) {
    let drawn = await draw(place);
    if (!place.parentElement.querySelector(".spec").textContent.includes('"vconcat"')) continue;
    let width = place.clientWidth;
    let waiting;
    addEventListener("resize", () => {
      clearTimeout(waiting);
      waiting = setTimeout(async () => {
        if (place.clientWidth === width) return;
        width = place.clientWidth;
        drawn.finalize();
        drawn = await draw(place);
      }, 200);
    });
  }
  document.documentElement.dataset.drawn = "yes";
}

// Tables that are sorted and searched: rows of plain values, of which some are shown.
const SHOWN = 500;

function liveTable(box) {
  const rows = JSON.parse(box.querySelector(".rows").textContent);
  const heads = [...box.querySelectorAll("thead th")];
  const body = box.querySelector("tbody");
  const count = box.querySelector(".count");
  const search = box.querySelector("input");
  // Words and who it is; of numbers that were measured any digits could be found.
  const searched = heads.flatMap((head, k) => (
    !head.classList.contains("n") || ["client", "number"].includes(head.textContent) ? [k] : []
  ));
  const texts = rows.map((row) => searched.map((k) => row[k] ?? "").join("\n").toLowerCase());
  let by = -1;
  let falling = false;
  const order = (a, b) => {
    const x = rows[a][by];
    const y = rows[b][by];
    const missing = (x === null || x === "") - (y === null || y === "");
    if (missing) return missing; // Last, whichever way.
    const less = typeof x === "number" && typeof y === "number"
      ? x - y : String(x).localeCompare(String(y), "en", { numeric: true });
    return (falling ? -less : less) || a - b;
  };
  const show = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = [...rows.keys()].filter((k) => words.every((w) => texts[k].includes(w)));
    if (by >= 0) found.sort(order);
    body.replaceChildren(...found.slice(0, SHOWN).map((k) => {
      const line = document.createElement("tr");
      rows[k].forEach((value, column) => {
        const cell = line.insertCell();
        cell.textContent = value ?? "";
        cell.className = heads[column].className;
      });
      return line;
    }));
    const more = found.length - SHOWN;
    count.textContent = more > 0 ? `${found.length} of ${rows.length}; the first ${SHOWN} are shown.`
      : words.length ? `${found.length} of ${rows.length}.` : "";
    heads.forEach((head, k) => {
      if (k === by) head.setAttribute("aria-sort", falling ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
  };
  heads.forEach((head, k) => head.addEventListener("click", () => {
    // Numbers: the largest first.
    falling = by === k ? !falling : head.classList.contains("n");
    by = k;
    show();
  }));
  search.addEventListener("input", show);
  show();
}

document.querySelectorAll(".live").forEach(liveTable);
let closed = [];
addEventListener("beforeprint", () => {
  closed = [...document.querySelectorAll("details:not([open])")];
  closed.forEach((details) => { details.open = true; });
});
addEventListener("afterprint", () => closed.forEach((details) => { details.open = false; }));
drawAll();
