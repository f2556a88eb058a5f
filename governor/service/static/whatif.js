// The what-if view: one batch under other settings, beside today's; applying them; a link that shows the same again.
//
// One question is under way at a time. What changes meanwhile is asked as soon as it is answered, so the latest
// settings always have the last word and a dragged slider does not pile questions up on the service.

import { ask } from "./api.js";
import { curvesChart, curvesOf } from "./charts.js";
import { confirmed } from "./dialog.js";
import { batches, called, poolName, refresh } from "./live.js";
import { $, about, cause, counted, duration, element, percent, say } from "./words.js";

const DEBOUNCE_MS = 60;
const FILE_BYTES_MOST = 7 * 2 ** 20;
const KNOBS = [
  { key: "estimate", env: "OPENAI_EST_TOKENS_PER_RUN", label: "Estimate", min: 1, max: 20000, step: 1, unit: "tokens a request", note: "counts under the rule fixed" },
  { key: "stagger", env: "OPENAI_STAGGER_SECONDS", label: "Stagger", min: 0, max: 60, step: 0.1, unit: "s" },
  { key: "headroom", env: "OPENAI_TPM_HEADROOM", label: "Headroom", min: 0, max: 60, step: 1, unit: "%", scale: 100 },
  { key: "concurrency", env: "OPENAI_MAX_CONCURRENCY", label: "Concurrency", min: 1, max: 64, step: 1, unit: "requests" },
];
const RULES = {
  fixed: "the estimate",
  auto: "as measured",
  learned: "as really used",
  prompt_chars4: "prompt characters",
  prompt_plus_max: "prompt and cap",
  max_of: "the larger one",
  responses: "prompt tokens",
};
const WINDOWS = { fixed: "fixed minutes", sliding: "last 60 s", bucket: "continuous refill" };
const CHOICES = [
  { key: "rule", env: "OPENAI_CHARGE_RULE", label: "Charge rule", options: RULES },
  { key: "window", env: "OPENAI_TPM_WINDOW", label: "Token window", options: WINDOWS },
];
const ALL = [CHOICES[0], ...KNOBS, CHOICES[1]];

let chart = null;
let today = null;
let lines = null;
let chosen = {};
let timer = 0;
let isAsking = false;
let isOutdated = false;

export function startWhatIf() {
  chart = curvesChart($("curves"));
  $("sliders").append(...ALL.map((knob) => (knob.options ? choiceOf(knob) : sliderOf(knob))));
  $("knobs").addEventListener("submit", (event) => event.preventDefault());
  $("source").addEventListener("change", () => (showSource(), later()));
  $("source-shape").addEventListener("input", later);
  $("what-if-file").addEventListener("change", readFile);
  $("apply").addEventListener("click", apply);
  $("reset").addEventListener("click", () => (choose(today), later()));
  $("copy").addEventListener("click", copyLink);
  document.addEventListener("batches-changed", listSources);
  $("pool").addEventListener("change", async () => isShown() && (await readToday(), choose(today), later()));
}

const isShown = () => !$("what-if-view").hidden;

/** Shows what a link says: batch, settings, pool. Settings that it does not name are today's. */
export async function openWhatIf(query) {
  try {
    await readToday();
  } catch (error) {
    trouble(error.message);
    return;
  }
  listSources();
  const named = ALL.filter((knob) => query.has(knob.key)).map((knob) => [knob.key, query.get(knob.key)]);
  choose({ ...today, ...Object.fromEntries(named) });
  const shape = (query.get("shape") ?? "").split("x");
  if (shape.length === 3) {
    ["requests", "prompt", "cap"].forEach((name, i) => ($(`shape-${name}`).value = shape[i]));
    $("source").value = "shape";
  } else if (query.has("batch")) {
    const id = query.get("batch");
    if (![...$("source").options].some((option) => option.value === id)) $("source").append(element("option", { value: id }, id));
    $("source").value = id;
    // Its own pool, where the one that is looked at has nothing of it.
    const pools = batches().find((batch) => batch.batch_id === id)?.pools ?? [];
    if (pools.length && !pools.includes(poolName())) $("pool").value = pools[0];
  }
  showSource();
  await askNow();
}

// ---------------------------------------------------------------- settings

async function readToday() {
  takeToday((await ask(`/settings?pool=${encodeURIComponent(poolName())}`)).settings);
}

function takeToday(found) {
  today = Object.fromEntries(ALL.map((knob) => [knob.key, shownValue(knob, found[knob.env])]));
  for (const { key, unit, note, options } of ALL) {
    const words = options ? `: ${options[today[key]]}` : ` ${unit}${note ? `; ${note}` : ""}`;
    say($(`${key}-today`), `today ${today[key]}${words}`);
  }
}

const shownValue = (knob, value) => (knob.scale ? String(+(value * knob.scale).toFixed(4)) : String(value));

function settings() {
  const value = (knob) => (knob.options ? chosen[knob.key] : +(Number(chosen[knob.key]) / (knob.scale ?? 1)).toFixed(6));
  return Object.fromEntries(ALL.map((knob) => [knob.env, value(knob)]));
}

function sliderOf(knob) {
  const { key, label, min, max, step, unit } = knob;
  const changed = (event) => {
    if (event.target.value === "" || !event.target.checkValidity()) return;
    choose({ ...chosen, [key]: event.target.value }, event.target);
    later();
  };
  const id = `knob-${key}`;
  const note = `${key}-today`;
  return element(
    "div",
    { class: "knob" },
    element("label", { for: id }, `${label}, ${unit}`),
    element("input", { type: "range", id, min, max, step, "aria-describedby": note, oninput: changed }),
    element("input", { type: "number", id: `${id}-number`, min, step: step === 1 && !knob.scale ? 1 : "any", "aria-label": `${label}, ${unit}, as a number`, oninput: changed }),
    element("span", { class: "note", id: note }),
  );
}

function choiceOf({ key, label, options }) {
  const id = `knob-${key}`;
  const note = `${key}-today`;
  const changed = (event) => (choose({ ...chosen, [key]: event.target.value }), later());
  const each = Object.entries(options).map(([name, meaning]) => element("option", { value: name }, `${name}: ${meaning}`));
  return element(
    "div",
    { class: "knob" },
    element("label", { for: id }, label),
    element("select", { id, "aria-describedby": note, onchange: changed }, ...each),
    element("span", { class: "note", id: note }),
  );
}

/** Shows these settings; the field that somebody types in is left alone. */
function choose(values, typing = null) {
  chosen = { ...values };
  for (const { key, max, unit } of KNOBS) {
    const slider = $(`knob-${key}`);
    // A value beyond the slider's end moves its end.
    slider.max = Math.max(max, Number(slider.max), Number(chosen[key]));
    for (const field of [slider, $(`knob-${key}-number`)]) if (field !== typing) field.value = chosen[key];
    slider.setAttribute("aria-valuetext", `${chosen[key]} ${unit}`);
  }
  for (const { key } of CHOICES) $(`knob-${key}`).value = chosen[key];
  $("apply").disabled = ALL.every(({ key }) => String(chosen[key]) === today[key]);
}

// ---------------------------------------------------------------- the batch

function listSources() {
  const wanted = [
    ...batches().map((batch) => [batch.batch_id, `${called(batch)}: ${counted(batch.requests, "request")}, ${batch.state}`]),
    ["file", "a file that is not sent off…"],
    ["shape", "by its numbers…"],
  ];
  const source = $("source");
  for (const [value, text] of wanted) {
    const option = [...source.options].find((each) => each.value === value);
    if (option) say(option, text);
    else source.add(element("option", { value }, text), value.startsWith("batch") ? 0 : undefined);
  }
}

function showSource() {
  $("source-file").hidden = $("source").value !== "file";
  $("source-shape").hidden = $("source").value !== "shape";
}

async function readFile() {
  const file = $("what-if-file").files[0];
  if (!file) return;
  lines = null;
  if (file.size > FILE_BYTES_MOST) return trouble("The file is larger than 7 MB: start it as a batch, or describe it by its numbers.");
  const texts = (await file.text()).split("\n");
  try {
    lines = texts.flatMap((text, i) => (text.trim() ? [parsed(text, i + 1)] : []));
    later();
  } catch (error) {
    trouble(error.message);
  }
}

function parsed(text, number) {
  try {
    return JSON.parse(text);
  } catch {
    throw new Error(`Line ${number} of the file is not JSON.`);
  }
}

/** What /what-if is asked about; null where something is missing. */
function subject() {
  const source = $("source").value;
  if (source === "file") return lines && { lines };
  if (source !== "shape") return source ? { batch_id: source } : null;
  const number = (name) => ($(`shape-${name}`).checkValidity() ? Number($(`shape-${name}`).value) : 0);
  const shape = { requests: number("requests"), prompt_tokens: number("prompt"), max_output_tokens: number("cap") };
  return Object.values(shape).every((value) => value > 0) ? { shape } : null;
}

// ---------------------------------------------------------------- asking and showing

function later() {
  clearTimeout(timer);
  timer = setTimeout(askNow, DEBOUNCE_MS);
}

async function askNow() {
  clearTimeout(timer);
  writeLink();
  const about = subject();
  if (!about) {
    say($("headline"), $("source").value === "file" ? "Choose a file." : "Choose a batch.");
    return;
  }
  isOutdated = true;
  if (isAsking) return;
  isAsking = true;
  $("curves").setAttribute("aria-busy", "true");
  while (isOutdated) {
    isOutdated = false;
    try {
      const json = { ...subject(), settings: settings(), pool: poolName() };
      const answer = await ask("/what-if", { method: "POST", json });
      trouble("");
      // Somebody else may have changed what is in force.
      takeToday(answer.today.settings);
      choose(chosen, document.activeElement);
      show(answer);
    } catch (error) {
      trouble(error.message);
    }
  }
  $("curves").removeAttribute("aria-busy");
  isAsking = false;
}

function trouble(text) {
  say($("what-if-trouble"), text);
  $("what-if-trouble").hidden = !text;
}

function show(answer) {
  const { today: before, proposed: after } = answer;
  const headline = headlineOf(before, after);
  say($("headline"), headline);
  chart.show(curvesOf(answer));
  $("curves").setAttribute("aria-label", `Share of the batch that is done over time. ${headline}`);
  const range = (found, words) => [...new Set([words(found.p5), words(found.p95)])].join(" to ");
  const figures = [
    ["Done, half of the runs", (side) => duration(side.finish_s.p50)],
    ["Done, 5 to 95\u00a0%", (side) => range(side.finish_s, duration)],
    ["429s, half of the runs", (side) => about(side.throttled.p50)],
    ["429s, 5 to 95\u00a0%", (side) => range(side.throttled, about)],
    ["Requests lost", (side) => about(side.failed)],
    ["Waits most for", (side) => (side.bound ? cause(side.bound) : "nothing")],
    ["Efficiency", (side) => (side.efficiency === null ? "–" : percent(side.efficiency))],
  ];
  const row = ([name, words]) =>
    element("tr", {}, element("th", { scope: "row" }, name), element("td", {}, words(before)), element("td", {}, words(after)));
  $("figures").tBodies[0].replaceChildren(...figures.map(row));
  const made = `${counted(answer.requests, "request")}, ${counted(answer.runs, "simulated run")} of each side in ${Math.round(answer.took_ms)} ms`;
  say($("what-if-note"), `${made}. The whole batch from an idle start; efficiency: the shortest possible time over the time needed.`);
}

function headlineOf(before, after) {
  const from = before.finish_s.p50;
  const to = after.finish_s.p50;
  const ratio = to > 0 ? from / to : 1;
  const same = Math.abs(ratio - 1) < 0.005;
  const other = ratio > 1 ? `${ratio.toFixed(ratio < 10 ? 2 : 0)} times as fast as` : `${(1 / ratio).toFixed(1 / ratio < 10 ? 2 : 0)} times as long as`;
  const time = same ? `Done in ${duration(to)}, as with today’s settings` : `Done in ${duration(to)}, ${other} today’s ${duration(from)}`;
  const lost = after.failed > 0 ? `, ${about(after.failed)} of them lost` : "";
  return `${time}; 429s: ${about(after.throttled.p50)}, today’s ${about(before.throttled.p50)}${lost}.`;
}

// ---------------------------------------------------------------- link and apply

function writeLink() {
  const query = new URLSearchParams();
  const source = $("source").value;
  if (source === "shape") query.set("shape", ["requests", "prompt", "cap"].map((name) => $(`shape-${name}`).value).join("x"));
  else if (source && source !== "file") query.set("batch", source);
  for (const { key } of ALL) query.set(key, chosen[key]);
  if ($("pool").options.length > 1) query.set("pool", poolName());
  if (isShown()) history.replaceState(null, "", `#what-if?${query}`);
}

async function copyLink() {
  writeLink();
  const file = $("source").value === "file" ? " The file itself is not part of it." : "";
  try {
    await navigator.clipboard.writeText(location.href);
    say($("what-if-said"), `The link is in the clipboard.${file}`);
  } catch {
    say($("what-if-said"), `The address of this page is the link.${file}`);
  }
}

async function apply() {
  try {
    // What is in force may have changed since the page was opened.
    await readToday();
    const changes = ALL.filter(({ key }) => String(chosen[key]) !== today[key]);
    if (!changes.length) {
      choose(chosen);
      say($("what-if-said"), "These settings are in force already.");
      return;
    }
    if (!(await confirmed("Apply these settings?", difference(changes), "Apply"))) return;
    const all = settings();
    const wanted = Object.fromEntries(changes.map(({ env }) => [env, all[env]]));
    await ask("/settings", { method: "PUT", json: { settings: wanted, pool: poolName() } });
    await readToday();
    choose(chosen);
    say($("what-if-said"), `Applied: ${changes.map(({ label, key }) => `${label.toLowerCase()} ${chosen[key]}`).join(", ")}.`);
    refresh();
    later();
  } catch (error) {
    say($("what-if-said"), `Not applied: ${error.message}`);
  }
}

function difference(changes) {
  const head = ["Setting", "In force", "New"].map((text) => element("th", { scope: "col" }, text));
  const body = changes.map(({ key, label, unit }) =>
    element(
      "tr",
      {},
      element("th", { scope: "row" }, unit ? `${label}, ${unit}` : label),
      element("td", { class: "number" }, today[key]),
      element("td", { class: "number" }, String(chosen[key])),
    ),
  );
  const table = element("table", {}, element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...body));
  const note = element("p", { class: "note" }, "They hold at once, for everything that runs in this pool, and are recorded with who and when.");
  return element("div", {}, table, note);
}
