// inspect.html: a list of groups, and the chosen one in full. Texts are untrusted: all of them go through textContent.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const ROW = 52;                     // pixels of a row of the list, as the style sheet has it
const AROUND = 8;                   // rows beyond the visible ones that are there already
const MOST_TOKENS = 2000;           // of a completion that are shown at first
const MOST_ELSEWHERE = 40;          // groups that are shown below one another

// ---------------------------------------------------------------- data

const QUANTITIES = new Map(data.quantities.map((quantity) => [quantity.name, quantity]));
const appearances = new Map();      // prompt -> its groups, in the order of the page
data.groups.forEach((group, number) => {
  group.number = number;
  if (!appearances.has(group.prompt)) appearances.set(group.prompt, []);
  appearances.get(group.prompt).push(group);
});

function textOf(completion) {
  return completion.text === undefined ? completion.tokens.join("") : completion.text;
}

function tokensOf(completion) {
  return completion.tokens === undefined ? [completion.text] : completion.tokens;
}

// The value of a quantity at a token; undefined where the loss did not compute it, null where it is not finite.
function valueOf(completion, name, at) {
  const { minus } = QUANTITIES.get(name);
  if (minus) {
    const [first, second] = minus.map((other) => stored(completion, other, at));
    return first == null || second == null ? undefined : first - second;
  }
  return stored(completion, name, at);
}

function stored(completion, name, at) {
  const values = completion[name];
  return Array.isArray(values) ? values[at] : values;     // one number stands for all tokens
}

function has(completion, name) {
  return valueOf(completion, name, 0) !== undefined;
}

function haystack(group) {          // what search looks through; made when it is first asked for
  if (group.haystack === undefined) {
    const prompt = data.prompts[group.prompt];
    const texts = group.completions.map(textOf);
    const about = [nameOf(group), prompt.question, prompt.gold, prompt.id, prompt.source];
    group.haystack = [...about, ...texts].join("\n").toLowerCase();
  }
  return group.haystack;
}

// ---------------------------------------------------------------- filters

const FILTERS = {
  flat: (group) => group.flat,
  wrong: (group) => group.completions.every((completion) => !completion.right),
  cut: (group) => group.completions.some((completion) => !completion.ended),
  disagree: (group) => group.completions.some((completion) => completion.agrees === false),
  clipped: (group) => group.completions.some(isClipped),
};

function isClipped(completion) {
  const values = completion.clipped;
  return Array.isArray(values) ? values.some((value) => value !== 0) : Boolean(values);
}

// A word as a whole word, whatever its case; null for none. Letters of any script are letters.
function wordPattern(text) {
  const word = text.trim();
  if (!word) return null;
  const literal = word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
  return new RegExp(`(?<![\\p{L}\\p{N}_])${literal}(?![\\p{L}\\p{N}_])`, "iu");
}

let shown = [];                     // the groups that the filters leave
let chosen = null;                  // the group in the detail
let pattern = null;                 // of the word that is asked for
let search = "";                    // the text that is searched for, in small letters

function filter() {
  const checked = Object.keys(FILTERS).filter((name) => byId(name).checked);
  const run = byId("run").value;
  const method = byId("method").value;
  const role = byId("role").value;
  search = byId("search").value.toLowerCase();
  pattern = wordPattern(byId("word").value);
  shown = data.groups.filter((group) =>
    (run === "" || group.run === Number(run))
    && (method === "" || group.method === method)
    && (role === "" || group.role === role)
    && checked.every((name) => FILTERS[name](group))
    && (pattern === null || group.completions.some((completion) => pattern.test(textOf(completion))))
    && (search === "" || haystack(group).includes(search)));
  let completions = 0;
  for (const group of shown) completions += group.completions.length;
  byId("count").textContent = `${shown.length} of ${data.groups.length} groups, ${completions} completions`;
  byId("space").style.height = `${shown.length * ROW}px`;
  drawList();
  if (shown.length && !shown.includes(chosen)) {
    choose(shown[0]);
    return;
  }
  if (!shown.length) {
    chosen = null;
    byId("list").removeAttribute("aria-activedescendant");
  }
  drawDetail();
}

// Whether a text is one of those that a word or a search asked for.
function isHit(text) {
  if (pattern !== null) return pattern.test(text);
  return search !== "" && text.toLowerCase().includes(search);
}

// ---------------------------------------------------------------- the list, of which only the visible rows are there

const rows = new Map();             // place in `shown` -> element

function drawList() {
  const list = byId("list");
  const first = Math.max(0, Math.floor(list.scrollTop / ROW) - AROUND);
  const last = Math.min(shown.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + AROUND);
  for (const [place, element] of rows) {
    if (place < first || place >= last || element.group !== shown[place]) {
      element.remove();
      rows.delete(place);
    }
  }
  for (let place = first; place < last; place++) {
    if (!rows.has(place)) rows.set(place, makeRow(place));
    const row = rows.get(place);
    row.classList.toggle("chosen", row.group === chosen);
    row.setAttribute("aria-selected", row.group === chosen);
  }
}

function makeRow(place) {
  const group = shown[place];
  const row = make("div", "row");
  row.group = group;
  row.id = `row-${group.number}`;
  row.setAttribute("role", "option");
  row.style.top = `${place * ROW}px`;
  row.append(make("div", "", visible(data.prompts[group.prompt].question.slice(0, 200)) || "(no question)"));
  const below = make("div", "quiet", `${nameOf(group)}  `);
  below.append(marks(group));
  row.append(below);
  byId("space").append(row);
  return row;
}

function marks(group) {
  const element = make("span", "marks");
  for (const completion of group.completions) {
    element.append(make("span", completion.right ? "good" : "bad", completion.right ? "✓" : "✗"));
  }
  return element;
}

// "embedded-1 · grpo_token · step 40 · best"
function nameOf(group) {
  const words = [];
  if (data.runs.length > 1) words.push(data.runs[group.run]);
  words.push(group.method);
  if (group.step !== undefined) words.push(`step ${group.step}`);
  words.push(group.role);
  return words.join(" · ");
}

function choose(group, focus) {
  chosen = group;
  const place = shown.indexOf(group);
  const list = byId("list");
  if (place >= 0) {
    const top = place * ROW;
    if (top < list.scrollTop) list.scrollTop = top;
    if (top + ROW > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW - list.clientHeight;
    list.setAttribute("aria-activedescendant", `row-${group.number}`);
  }
  drawList();
  drawDetail();
  byId("detail").scrollTop = 0;
  if (focus) list.focus({ preventScroll: true });
}

// ---------------------------------------------------------------- the chosen group

let below = false;                  // whether all appearances of the prompt are shown

function drawDetail() {
  const detail = byId("detail");
  detail.replaceChildren();
  hideValues();
  if (chosen === null) {
    const why = data.groups.length ? "No group passes the filters." : "Nothing is recorded here.";
    detail.append(make("p", "quiet", why));
    return;
  }
  const prompt = data.prompts[chosen.prompt];
  const others = appearances.get(chosen.prompt);
  const head = make("div", "prompt");
  const pictures = make("div");
  for (const url of prompt.pictures) pictures.append(makePicture(url));
  const words = make("div");
  words.append(make("div", "quiet", [prompt.id, prompt.source].filter(Boolean).map(visible).join(", ")));
  words.append(make("div", "question", visible(prompt.question)));
  const gold = make("div", "", "gold answer: ");
  gold.append(make("b", "", visible(prompt.gold)));
  words.append(gold);
  if (others.length > 1) words.append(makeElsewhere(others));
  head.append(pictures, words);
  detail.append(head);
  const groups = below ? [chosen, ...others.filter((group) => group !== chosen)].slice(0, MOST_ELSEWHERE) : [chosen];
  for (const group of groups) detail.append(makeGroup(group));
}

function makePicture(url) {
  const box = make("div", "picture");
  const image = make("img");
  image.alt = "picture";
  image.src = url;
  image.onload = () => image.classList.toggle("small", Math.max(image.naturalWidth, image.naturalHeight) <= 160);
  box.append(image);
  return box;
}

function makeElsewhere(others) {
  const box = make("div");
  const label = make("label", "quiet");
  const tick = make("input");
  tick.type = "checkbox";
  tick.id = "below";
  tick.checked = below;
  tick.onchange = () => { below = tick.checked; drawDetail(); };
  label.append(tick, ` all ${others.length} groups of this prompt below one another`);
  const buttons = make("div", "elsewhere");
  for (const group of others) {
    const right = group.completions.filter((completion) => completion.right).length;
    const button = make("button", "", `${nameOf(group)} ${right}/${group.completions.length} ✓`);
    button.setAttribute("aria-current", group === chosen);
    button.onclick = () => choose(group);
    buttons.append(button);
  }
  box.append(label, buttons);
  return box;
}

function makeGroup(group) {
  const section = make("section", "group");
  const notes = [];
  if (group.flat) notes.push("flat: all rewards are equal");
  if (group.updated === false) notes.push("not in the update");
  const heading = make("h2", "", nameOf(group));
  heading.append(make("span", "quiet", notes.length ? `  ${notes.join("; ")}` : ""));
  const cards = make("div", "cards");
  group.completions.forEach((completion, place) => cards.append(makeCard(group, completion, place)));
  section.append(heading, cards);
  return section;
}

function makeCard(group, completion, place) {
  const card = make("article", "card");
  card.tabIndex = 0;
  card.completion = completion;
  card.group = group;
  card.at = -1;                     // the token whose values are shown
  const head = make("div");
  head.append(make("span", completion.right ? "good" : "bad", completion.right ? "✓ right" : "✗ wrong"));
  const label = completion.label === undefined ? `${place + 1}` : completion.label;
  const words = [label];
  if (completion.reward !== undefined) words.push(`reward ${number(completion.reward)}`);
  if (!Array.isArray(completion.advantage) && completion.advantage != null) {
    words.push(`advantage ${signed(completion.advantage)}`);
  }
  if (completion.tokens) words.push(`${completion.tokens.length} tokens`);
  if (!completion.ended) words.push("cut off");
  if (completion.agrees === false) words.push("thought and answer disagree");
  head.append(make("span", "quiet", `  ${words.join(" · ")}`));
  card.append(head, makeText(completion, MOST_TOKENS));
  card.classList.toggle("hit", isHit(textOf(completion)));
  const wanted = byId("colour").value;
  if (wanted && completion.tokens && !has(completion, wanted)) {
    card.append(make("div", "quiet", `${QUANTITIES.get(wanted).label}: not computed here`));
  }
  if (completion.look && Object.keys(completion.look).length) card.append(makeLook(card));
  card.append(makeParts(completion));
  return card;
}

function makeText(completion, most) {
  const box = make("div", "text");
  const tokens = tokensOf(completion);
  const scale = byId("colour").value;
  tokens.slice(0, most).forEach((token, at) => {
    const span = make("span", "", visible(token));
    if (completion.tokens) span.at = at;
    if (scale && completion.tokens) paint(span, completion, scale, at);
    if (token === "" && at === tokens.length - 1 && completion.ended) {
      span.textContent = "∎";
      span.classList.add("end");
    }
    box.append(span);
  });
  if (tokens.length > most) {
    const more = make("button", "", `the other ${tokens.length - most} tokens`);
    more.onclick = () => box.replaceWith(makeText(completion, tokens.length));
    box.append(more);
  }
  if (!textOf(completion) && !completion.tokens) box.append(make("span", "quiet", "(empty)"));
  return box;
}

function makeParts(completion) {
  const table = make("table");
  for (const [name, value, weight, counts, why] of completion.parts) {
    const row = make("tr");
    const paid = weight ? ` × ${number(weight)}` : ", not paid";
    const gated = weight && value !== counts ? ", gated" : "";
    row.append(make("th", "", name), make("td", "", `${number(value)}${paid}${gated}`), make("td", "", visible(why)));
    table.append(row);
  }
  if (completion.fault && !completion.parts.some(([name]) => name === "format")) {
    const row = make("tr");
    row.append(make("th", "", "form"), make("td"), make("td", "", completion.fault));
    table.append(row);
  }
  return table;
}

// ---------------------------------------------------------------- colours

const scales = new Map();           // quantity -> the size at which its colour is full

// The 98th percentile of the quantity's size over at most some 50,000 tokens of the page.
function scaleOf(name) {
  if (!scales.has(name)) {
    const sizes = [];
    for (const group of data.groups) {
      if (sizes.length > 50000) break;
      for (const completion of group.completions) {
        const count = completion.tokens && has(completion, name) ? completion.tokens.length : 0;
        for (let at = 0; at < count; at++) sizes.push(Math.abs(strength(completion, name, at)));
      }
    }
    const finite = sizes.filter(Number.isFinite).sort((a, b) => a - b);
    scales.set(name, finite[Math.floor(0.98 * (finite.length - 1))] || 1);
  }
  return scales.get(name);
}

// What colours a token: 0 for none. A ratio counts by its logarithm, a log-prob by how far below 0 it is.
function strength(completion, name, at) {
  const value = valueOf(completion, name, at);
  if (value == null) return NaN;
  const kind = QUANTITIES.get(name).kind;
  if (kind === "ratio") return Math.log(value);
  if (kind === "logp") return -value;
  return value;
}

function paint(span, completion, name, at) {
  const value = strength(completion, name, at);
  if (Number.isNaN(value)) return;
  const share = Math.min(1, Math.abs(value) / scaleOf(name));
  const side = value < 0 || isOneSided(name) ? "minus" : "plus";
  span.style.background = `rgba(var(--${side}), ${(0.62 * share).toFixed(3)})`;
  const sign = stored(completion, "clipped", at);
  if (name === "ratio" || name === "clipped") {
    span.classList.toggle("low", sign === -1);
    span.classList.toggle("high", sign === 1);
  }
}

function isOneSided(name) {
  return ["logp", "size"].includes(QUANTITIES.get(name).kind);
}

function drawLegend() {
  const legend = byId("legend");
  legend.replaceChildren();
  const name = byId("colour").value;
  if (!name) return;
  const most = scaleOf(name);
  const kind = QUANTITIES.get(name).kind;
  const bar = make("i");
  const full = (side) => `rgba(var(--${side}), .62)`;
  let ends;
  if (isOneSided(name)) {
    bar.style.background = `linear-gradient(90deg, transparent, ${full("minus")})`;
    ends = ["0", number(kind === "logp" ? -most : most)];
  } else {
    bar.style.background = `linear-gradient(90deg, ${full("minus")}, transparent, ${full("plus")})`;
    ends = kind === "ratio" ? [number(Math.exp(-most)), number(Math.exp(most))] : [number(-most), signed(most)];
  }
  legend.append(make("span", "quiet", ends[0]), bar, make("span", "quiet", ends[1]));
  legend.title = QUANTITIES.get(name).what;
}

// ---------------------------------------------------------------- values of a token

function showValues(card, at, x, y) {
  const completion = card.completion;
  const box = byId("values");
  box.replaceChildren();
  const token = make("div", "text", JSON.stringify(visible(completion.tokens[at].slice(0, 300))));
  box.append(token, make("div", "quiet", `token ${at + 1} of ${completion.tokens.length}, id ${completion.ids[at]}`));
  const table = make("table");
  for (const { name, label } of data.quantities) {
    const value = valueOf(completion, name, at);
    if (value === undefined) continue;
    const row = make("tr");
    row.append(make("td", "quiet", label), make("td", "", value === null ? "not finite" : number(value)));
    table.append(row);
  }
  box.append(table);
  box.hidden = false;
  const { width, height } = box.getBoundingClientRect();
  box.style.left = `${Math.max(4, Math.min(x + 12, innerWidth - width - 8))}px`;
  box.style.top = `${Math.max(4, y + 18 + height > innerHeight ? y - height - 12 : y + 18)}px`;
  if (completion.look && at in completion.look) overlay(completion.look[at], card.group);
}

function hideValues() {
  byId("values").hidden = true;
  for (const span of document.querySelectorAll(".here")) span.classList.remove("here");
}

// The token cursor of the completion in focus.
function step(card, by) {
  const spans = [...card.querySelectorAll(".text span")].filter((span) => span.at !== undefined);
  if (!spans.length) return;
  card.at = Math.max(0, Math.min(spans.length - 1, card.at + by));
  hideValues();
  const span = spans[card.at];
  span.classList.add("here");
  span.scrollIntoView({ block: "nearest" });
  const { left, bottom } = span.getBoundingClientRect();
  showValues(card, span.at, left, bottom);
}

// ---------------------------------------------------------------- where the model looked

function makeLook(card) {
  const button = make("button", "", "where it looked");
  button.title = "attention of the stage's finished model, mean over blocks and heads, "
    + "as it predicts the answer's tokens";
  button.setAttribute("aria-pressed", "false");
  button.onclick = () => {
    const on = button.getAttribute("aria-pressed") === "false";
    for (const other of document.querySelectorAll("button[aria-pressed]")) other.setAttribute("aria-pressed", "false");
    button.setAttribute("aria-pressed", on);
    overlay(on ? average(Object.values(card.completion.look)) : null, card.group);
  };
  return button;
}

function average(all) {
  const sum = all[0].map(() => 0);
  for (const values of all) values.forEach((value, i) => { sum[i] += value / all.length; });
  return sum;
}

// Darkens what was looked at least. values: of the patches of all pictures, in reading order; null: no overlay.
function overlay(values, group) {
  const boxes = [...document.querySelectorAll(".picture")];
  for (const box of boxes) for (const canvas of box.querySelectorAll("canvas")) canvas.remove();
  if (values === null) return;
  const side = group.look.side;
  const most = Math.max(...values);
  boxes.forEach((box, number) => {
    const image = box.querySelector("img");
    const canvas = make("canvas");
    canvas.width = side;
    canvas.height = side;
    const paint = canvas.getContext("2d");
    for (let i = 0; i < side * side; i++) {
      const share = most ? values[number * side * side + i] / most : 0;
      paint.fillStyle = `rgba(0, 0, 0, ${(0.85 * (1 - share)).toFixed(3)})`;
      paint.fillRect(i % side, Math.floor(i / side), 1, 1);
    }
    // The square that the model saw: the middle of the picture, or the picture in the middle of a square.
    const { width, height } = image.getBoundingClientRect();
    const edge = group.look.fit === "pad" ? Math.max(width, height) : Math.min(width, height);
    canvas.style.left = `${(width - edge) / 2}px`;
    canvas.style.top = `${(height - edge) / 2}px`;
    canvas.style.width = canvas.style.height = `${edge}px`;
    canvas.style.imageRendering = "pixelated";
    box.append(canvas);
  });
}

// ---------------------------------------------------------------- small things

function make(tag, name = "", text = "") {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text) element.textContent = text;
  return element;
}

// Characters without a picture of their own, and those that turn the direction of what follows, by their numbers.
function visible(text) {
  return text.replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]/g,
    (sign) => `⟨U+${sign.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
}

function number(value) {
  return String(Number(value.toPrecision(5)));
}

function signed(value) {
  return value > 0 ? `+${number(value)}` : number(value);
}

function option(select, value, text) {
  const element = make("option", "", text);
  element.value = value;
  select.append(element);
}

// ---------------------------------------------------------------- mouse and keys

function nextOf(groups, by) {
  const place = groups.indexOf(chosen);
  return groups[Math.max(0, Math.min(groups.length - 1, place + by))];
}

function nextColour(by) {
  const select = byId("colour");
  select.selectedIndex = (select.selectedIndex + by + select.length) % select.length;
  select.dispatchEvent(new Event("change"));
}

const KEYS = {
  j: () => shown.length && choose(nextOf(shown, 1), true),
  k: () => shown.length && choose(nextOf(shown, -1), true),
  ArrowDown: () => KEYS.j(),
  ArrowUp: () => KEYS.k(),
  n: () => chosen && choose(nextOf(appearances.get(chosen.prompt), 1)),
  p: () => chosen && choose(nextOf(appearances.get(chosen.prompt), -1)),
  a: () => { below = !below; drawDetail(); },
  c: () => nextColour(1),
  C: () => nextColour(-1),
  "[": () => document.activeElement.completion && step(document.activeElement, -1),
  "]": () => document.activeElement.completion && step(document.activeElement, 1),
  "/": () => byId("search").focus(),
  "?": () => byId("keys").showModal(),
  Escape: () => { hideValues(); overlay(null); },
};

document.addEventListener("keydown", (event) => {
  const field = event.target.closest("input:not([type=checkbox]), select");
  if (field && event.key === "Escape") field.blur();
  const scrolls = event.key.startsWith("Arrow") && event.target !== byId("list");
  if (field || scrolls || event.ctrlKey || event.metaKey || event.altKey || byId("keys").open) return;
  if (Object.hasOwn(KEYS, event.key)) {
    event.preventDefault();
    KEYS[event.key]();
  }
});

byId("detail").addEventListener("mouseover", (event) => {
  if (event.target.at === undefined) return;
  hideValues();
  event.target.classList.add("here");
  showValues(event.target.closest(".card"), event.target.at, event.clientX, event.clientY);
});
byId("detail").addEventListener("mouseout", hideValues);
byId("detail").addEventListener("scroll", hideValues);
byId("space").addEventListener("click", (event) => {
  const row = event.target.closest(".row");
  if (row) choose(row.group);
});
byId("list").addEventListener("scroll", () => requestAnimationFrame(drawList));
addEventListener("resize", drawList);
byId("help").onclick = () => byId("keys").showModal();
byId("colour").onchange = () => { drawLegend(); drawDetail(); };
for (const id of [...Object.keys(FILTERS), "run", "method", "role"]) byId(id).onchange = filter;
for (const id of ["word", "search"]) byId(id).oninput = filter;

// ---------------------------------------------------------------- the beginning

option(byId("run"), "", "all runs");
data.runs.forEach((name, place) => option(byId("run"), String(place), name));
byId("run").hidden = data.runs.length < 2;
option(byId("method"), "", "all stages");
for (const name of new Set(data.groups.map((group) => group.method))) option(byId("method"), name, name);
option(byId("role"), "", "all roles");
for (const name of new Set(data.groups.map((group) => group.role))) option(byId("role"), name, name);
option(byId("colour"), "", "nothing");
for (const { name, label } of data.quantities) {
  if (data.groups.some((group) => group.completions.some((completion) => completion.tokens && has(completion, name)))) {
    option(byId("colour"), name, label);
  }
}
if ([...byId("colour").options].some((item) => item.value === "sampled")) byId("colour").value = "sampled";
drawLegend();
filter();
