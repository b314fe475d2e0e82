// Shows one example at a time, from the JSON in #data. Text of the data only ever becomes text nodes and titles.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const VIEWS = {tokens: showTokens, text: showText, table: showTable};
let current = 1;
let view = "tokens";

// A new element; attributes with a value of false or null are left out.
function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name === "onclick" || name === "onchange") element[name] = value;
    else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== ""));
  return element;
}

const count = (number) => number.toLocaleString("en");
const percent = (part, whole) => (whole ? `${(100 * part / whole).toFixed(1)}%` : "–");
const plural = (number, name) => `${count(number)} ${name}${number === 1 ? "" : "s"}`;
const link = (number, ...children) => make("a", {href: `#example-${number}`}, ...children);

// The position of a column in its example; see as_json in records.py.
const position = (example, column) =>
  example.gap && column >= example.gap.position ? column + example.gap.num_tokens : column;

// Columns [start, end) of each piece: a token, or the tokens of one character.
function* pieces(example) {
  const texts = example.tokens.texts;
  for (let start = 0, end; start < texts.length; start = end) {
    for (end = start + 1; end < texts.length && texts[end] === null; end++);
    yield [start, end];
  }
}

const gapText = (gap) => `${plural(gap.num_tokens, "more token")}, ${count(gap.num_trained)} of them trained`;
const isBehindGap = (example, column) => example.gap && column === example.gap.position;

function showTokens(example) {
  const {texts, ids, weights, writers} = example.tokens;
  const special = new Set(example.special), stops = new Set(example.stops), injected = new Set();
  for (const each of example.injections) {
    for (let at = 0; at < each.num_tokens; at++) injected.add(each.position + at);
  }
  const body = make("pre", {class: "tokens", tabindex: "0", "aria-label": "tokens"});
  let last = 0;
  for (const [start, end] of pieces(example)) {
    if (isBehindGap(example, start)) body.append(make("span", {class: "gap"}, gapText(example.gap)));
    const weight = weights[start], writer = data.writers[writers[start]], first = position(example, start);
    const appended = example.appended_stop && end === texts.length;
    if (weight !== last && weight !== 0 && weight !== 1) body.append(make("sup", {class: "factor"}, `${weight}×`));
    last = weight;
    const names = ["t", `by-${writer}`];
    if (weight) names.push("trained");
    if (special.has(start)) names.push("special");
    if (stops.has(start)) names.push("stop");
    if (injected.has(first)) names.push("injected");
    const spelt = JSON.stringify(texts[start]).slice(1, -1);
    const title = [
      `“${spelt}”`,
      `id ${ids.slice(start, end).join(" ")}`,
      `position ${first}${end > start + 1 ? ` to ${first + end - start - 1}` : ""}`,
      weight ? `trained, weight ${weight}` : "context, weight 0",
      `written by ${writer}`,
      stops.has(start) ? (appended ? "stop token, appended" : "stop token") : "",
    ].filter(Boolean).join(" · ");
    const token = make("span", {class: names.join(" "), title});
    if (weight) token.style.setProperty("--weight", 0.3 + 0.7 * Math.min(weight, 1));
    for (const part of texts[start].split(/([\n\t])/)) {
      if (part === "\n") token.append(make("i", {class: "nl"}));
      if (part === "\t") token.append(make("i", {class: "tab"}));
      token.append(part);
    }
    if (texts[start] === "") token.append(make("i", {class: "empty"}));
    if (end > start + 1) token.append(make("sub", {}, String(end - start)));
    body.append(token);
  }
  return [legend(example), body];
}

function legend(example) {
  const written = new Set(example.tokens.writers.map((index) => data.writers[index]));
  const item = (name, meaning, text) => make("span", {}, make("i", {class: `t ${name}`}, text), meaning);
  const items = [
    item("trained by-assistant", "the model learns to write it", "trained"),
    item("trained stop", "trained, ends the answer", "stop"),
    item("special", "control token", "special"),
    item("by-template", "the template's text", "markup"),
  ];
  if (example.injections.length) items.push(item("injected", "the template's, and no row holds it", "added"));
  for (const writer of data.writers) {
    if (written.has(writer) && writer !== "template") items.push(item(`by-${writer}`, "", writer));
  }
  return make("p", {class: "legend"}, ...items);
}

function showText(example) {
  const body = make("pre", {class: "text", tabindex: "0", "aria-label": "text"});
  example.tokens.texts.forEach((text, column) => {
    if (isBehindGap(example, column)) body.append(make("span", {class: "gap"}, gapText(example.gap)));
    body.append(text || "");
  });
  body.normalize();
  return [body];
}

function showTable(example) {
  const {texts, ids, weights, writers} = example.tokens;
  const rows = [];
  texts.forEach((text, column) => {
    if (isBehindGap(example, column)) rows.push(make("tr", {}, make("td", {colspan: 5}, gapText(example.gap))));
    const spelt = text === null ? "(same character)" : JSON.stringify(text);
    const writer = data.writers[writers[column]], weight = weights[column];
    rows.push(make("tr", {class: weight ? "trained" : null},
      make("td", {}, count(position(example, column))), make("td", {}, String(ids[column])),
      make("td", {}, make("code", {class: text === null ? "same" : null}, spelt)),
      make("td", {}, String(weight)), make("td", {}, make("i", {class: `t by-${writer}`}, writer))));
  });
  const names = ["position", "id", "token", "weight", "written by"].map((name) => make("th", {}, name));
  return [make("div", {class: "scroll"},
    make("table", {class: "table"}, make("thead", {}, make("tr", {}, ...names)), make("tbody", {}, ...rows)))];
}

// The row that the example stands in, to scale.
function strip(example) {
  if (example.row === null) {
    return make("p", {class: "hint"}, "Its row was not looked for: it comes late in a long epoch, or not in the first.");
  }
  const row = data.rows[example.row];
  const segments = row.segments.map((segment, index) => {
    const here = index + 1 === example.segment;
    const title = `${plural(segment.num_tokens, "token")}, ${count(segment.num_trained)} trained` +
      (here ? ": this example" : segment.shown === null ? ": not shown" : `: example ${segment.shown}`);
    const runs = segment.runs.map((size, at) => {
      const run = make("i", {class: at % 2 ? "on" : "off"});
      run.style.flexGrow = size;
      return run;
    });
    const name = `segment${here ? " here" : ""}`;
    // Where an example stands twice in the preview, the one in this row is meant.
    const target = data.examples.find((each) => each.row === example.row && each.segment === index + 1);
    const number = target ? target.number : segment.shown;
    const made = number === null ? make("span", {class: `${name} hidden`, title}, ...runs)
      : make("a", {class: name, href: `#example-${number}`, title, "aria-label": title}, ...runs);
    made.style.flexGrow = segment.num_tokens;
    return made;
  });
  if (row.num_padding) {
    const padding = make("span", {class: "padding", title: `${count(row.num_padding)} positions of padding`});
    padding.style.flexGrow = row.num_padding;
    segments.push(padding);
  }
  return make("div", {class: "packing"}, make("p", {class: "hint"}, data.headings[example.row]),
    make("nav", {class: "strip", "aria-label": "examples of this row"}, ...segments));
}

function siblings(example) {
  if (example.num_siblings < 2) return null;
  const links = example.siblings.map((number) =>
    number === example.number ? make("b", {}, String(number)) : link(number, String(number)));
  const hidden = example.num_siblings - example.siblings.length;
  return make("p", {class: "siblings"}, `One of ${example.num_siblings} examples of this conversation or text: `, ...links,
    hidden ? ` and ${hidden} not shown` : "");
}

// What the template says of its own, each on a line; `quoted` in pieces.py does the same.
function injections(example) {
  if (!example.injections.length) return null;
  const quotes = example.injections.map((each) =>
    make("li", {title: each.text}, each.text.trim().replace(/\s+/g, " ").replace(/^[^\p{L}\p{N}_<{]+/u, "")));
  const kind = example.injections.some((each) => each.is_system) ? "system text" : "text";
  return make("div", {class: "warning"}, make("b", {}, `The template adds ${kind} that no row holds`),
    make("ul", {}, ...quotes));
}

const fileName = (path) => path.split("/").pop();

function show(number) {
  current = Math.min(Math.max(number, 1), data.examples.length);
  const example = data.examples[current - 1];
  const options = data.examples.map((each) => make("option", {value: each.number, selected: each.number === current},
    `${each.number} · ${fileName(each.origin)} · ${each.reasons.join(", ")}`));
  const step = (by, name, text) => make("button", {type: "button", "aria-label": name, title: name,
    disabled: current + by < 1 || current + by > data.examples.length, onclick: () => go(current + by)}, text);
  const views = Object.keys(VIEWS).map((name) => make("button", {type: "button", "aria-pressed": String(name === view),
    onclick: () => { view = name; show(current); }}, name));
  const facts = [example.origin, data.sources.length > 1 ? `source ${example.source + 1}` : "",
    plural(example.num_tokens, "token"),
    `${count(example.num_trained)} trained (${percent(example.num_trained, example.num_tokens)})`,
    `number ${count(example.example)} of the data`, example.appended_stop ? "stop token appended" : ""];
  const badges = example.reasons.map((reason) => make("span", {class: "badge"}, reason));
  document.getElementById("viewer").replaceChildren(
    make("div", {class: "bar"},
      make("h2", {}, `Example ${current} `, make("small", {}, `of ${data.examples.length}`)),
      step(-1, "previous example (left arrow)", "‹"),
      make("select", {"aria-label": "example", onchange: (event) => go(Number(event.target.value))}, ...options),
      step(1, "next example (right arrow)", "›"),
      make("div", {class: "views", role: "group", "aria-label": "view"}, ...views)),
    make("article", {id: `example-${current}`},
      make("p", {class: "facts-line"}, ...badges, ...facts.filter(Boolean).map((fact) => make("span", {}, fact))),
      siblings(example), strip(example), injections(example), ...VIEWS[view](example)));
}

function go(number) {
  const had = document.activeElement && document.activeElement.getAttribute("aria-label");
  history.replaceState(null, "", `#example-${Math.min(Math.max(number, 1), data.examples.length)}`);
  show(number);
  // The control that was used is a new one now; keep the keyboard there.
  const again = had && document.querySelector(`#viewer [aria-label="${CSS.escape(had)}"]`);
  if (again) again.focus({preventScroll: true});
}

function fromAddress() {
  const found = /^#example-(\d+)$/.exec(location.hash);
  show(found ? Number(found[1]) : current);
}

addEventListener("hashchange", fromAddress);
addEventListener("keydown", (event) => {
  if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey || event.target.tagName === "SELECT") return;
  const by = {ArrowLeft: -1, ArrowRight: 1}[event.key];
  if (by) {
    event.preventDefault();
    go(current + by);
  }
});
fromAddress();
