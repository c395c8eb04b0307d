// Builds elements: tables, bars, lines. Text is set as text, never as markup.

const SVG = "http://www.w3.org/2000/svg";

export function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  return fill(element, attributes, children);
}

export function draw(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

function fill(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export function put(id, ...children) {
  document.getElementById(id).replaceChildren(...children);
}

const counted = new Intl.NumberFormat("en");
export const number = (value) => counted.format(Math.round(value));

export function short(value) {
  for (const [size, unit] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "K"]]) {
    if (value >= size) return `${(value / size).toFixed(value >= 100 * size ? 0 : 1)}${unit}`;
  }
  return number(value);
}

export const bytes = (value) => `${short(value)}B`;
export const percent = (part, whole) => (whole ? `${((100 * part) / whole).toFixed(1)}%` : "–");
export const seconds = (value) => (value >= 10 ? `${value.toFixed(1)} s` : `${(1000 * value).toFixed(value < 0.1 ? 1 : 0)} ms`);

export function ago(value) {
  const gone = Math.max(0, value);
  if (gone < 90) return `${Math.round(gone)} s ago`;
  if (gone < 5400) return `${Math.round(gone / 60)} min ago`;
  return `${Math.round(gone / 3600)} h ago`;
}

// columns: [title, cell(row), is it text?]
export function table(caption, columns, rows, empty) {
  if (!rows.length) return make("p", { class: "empty" }, empty);
  const head = make("tr", {}, ...columns.map(([title, , left]) => make("th", { scope: "col", class: left ? "left" : "" }, title)));
  const body = rows.map((row) =>
    make("tr", {}, ...columns.map(([, cell, left]) => make("td", { class: left ? "left" : "" }, cell(row) ?? ""))));
  return make("table", {}, make("caption", {}, caption), make("thead", {}, head), make("tbody", {}, ...body));
}

// parts: [class, value]; the bar's length is of `whole`.
export function bar(parts, whole, label) {
  const picture = draw("svg", { viewBox: "0 0 1000 10", preserveAspectRatio: "none", role: "img", "aria-label": label });
  let at = 0;
  for (const [kind, value] of parts) {
    const width = whole ? (1000 * value) / whole : 0;
    picture.append(draw("rect", { class: kind, x: at, y: 0, width, height: 10 }));
    at += width;
  }
  return make("div", { class: "bar" }, picture);
}

// rows: [name, value, shown]
export function bars(rows, kind, empty) {
  if (!rows.length) return make("p", { class: "empty" }, empty);
  const most = Math.max(...rows.map(([, value]) => value), 1);
  return make("dl", { class: "bars" }, ...rows.flatMap(([name, value, shown]) =>
    [make("dt", {}, name), bar([[kind, value]], most, `${name}: ${shown}`), make("dd", {}, shown)]));
}

// lines: [{values, class, name}], null where there is nothing; most: of the axis, or null for the largest value.
export function chart(points, lines, { most = null, show = short, empty }) {
  const has = lines.some((line) => line.values.some((value) => value !== null && value > 0));
  if (!has) return make("p", { class: "empty" }, empty);
  const [width, height, left, bottom] = [420, 150, 44, 18];
  const top = most ?? Math.max(...lines.flatMap((line) => line.values.map((value) => value ?? 0)), 1e-9) * 1.05;
  const x = (index) => left + ((width - left - 4) * index) / Math.max(1, points.length - 1);
  const y = (value) => height - bottom - ((height - bottom - 6) * value) / top;
  const said = lines.map((line) => `${line.name}: now ${show(line.values.findLast((value) => value !== null) ?? 0)}`).join("; ");
  const picture = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": said });
  for (const share of [0, 0.5, 1]) {
    picture.append(draw("line", { class: "grid", x1: left, x2: width, y1: y(share * top), y2: y(share * top) }));
    picture.append(draw("text", { x: left - 4, y: y(share * top) + 4, "text-anchor": "end" }, show(share * top)));
  }
  const clock = (at) => new Date(1000 * at).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
  picture.append(draw("text", { x: left, y: height - 3 }, clock(points[0].at)));
  picture.append(draw("text", { x: width, y: height - 3, "text-anchor": "end" }, clock(points.at(-1).at)));
  for (const line of lines) {
    let path = "", begun = false;
    line.values.forEach((value, index) => {
      if (value === null) { begun = false; return; }
      path += `${begun ? "L" : "M"}${x(index).toFixed(1)} ${y(Math.min(value, top)).toFixed(1)}`;
      // A point between two gaps would draw nothing.
      if (!begun && (line.values[index + 1] ?? null) === null) path += "h2";
      begun = true;
    });
    picture.append(draw("path", { class: `line ${line.class ?? ""}`, d: path }));
  }
  return picture;
}

export function legend(entries) {
  return make("ul", { class: "legend" }, ...entries.map(([kind, text]) => make("li", {},
    draw("svg", { viewBox: "0 0 10 10", "aria-hidden": "true" }, draw("rect", { class: kind, width: 10, height: 10 })), text)));
}
