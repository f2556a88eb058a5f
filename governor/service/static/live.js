// The live view: what goes on in a pool, its batches, and steering them.

import { ask, download, listen } from "./api.js";
import { paceChart } from "./charts.js";
import { confirmed } from "./dialog.js";
import { $, cause, count, counted, duration, element, percent, say } from "./words.js";

const SERIES_EVERY_MS = 2500;
const SHOWN = 20;
const SLOTS_SHOWN = 60;
const OVER = ["completed", "cancelled"];
const WAYS = { batch: "Batch API", auto: "cheapest in time" };
const VERBS = { pause: "Pause", resume: "Resume", cancel: "Cancel" };

let chart = null;
let stepS = 5;
let latest = null;
let listed = [];
const rows = new Map();

/** The pool that is looked at. */
export const poolName = () => $("pool").value || latest?.pools[0]?.pool || "";

/** Batches, newest first, as last heard of. */
export const batches = () => listed;

/** What a batch is called: its name, else the end of its id. */
export const called = (batch) => batch.name || `…${batch.batch_id.slice(-6)}`;

export function startLive(connection) {
  chart = paceChart($("pace"), () => stepS);
  $("pool").addEventListener("change", () => (render(), refresh()));
  $("start-form").addEventListener("submit", startBatch);
  $("start-via").addEventListener("change", showBy);
  listen(
    "/live/events",
    (name, content) => {
      if (name !== "live") return;
      latest = content;
      overlay(content.batches);
      render();
    },
    connection,
  );
  const again = async () => {
    if (!document.hidden) await refresh();
    setTimeout(again, SERIES_EVERY_MS);
  };
  again();
  document.addEventListener("token-changed", refresh);
}

/** What the stream does not bring: the series, and batches that are over. */
export async function refresh() {
  try {
    const [live, list] = await Promise.all([ask("/live?series=true"), ask(`/batches?limit=${SHOWN}`)]);
    listed = list.batches;
    renderBatches();
    latest ??= live;
    const pool = live.pools.find((each) => each.pool === poolName());
    if (pool) renderPace(pool);
    document.dispatchEvent(new Event("batches-changed"));
  } catch {
    // The stream says what is wrong with the connection; once is enough.
  }
}

/** Newer states of batches that are listed; one that is not is listed at the next refresh. */
function overlay(found) {
  const byId = new Map(found.map((batch) => [batch.batch_id, batch]));
  listed = listed.map((batch) => byId.get(batch.batch_id) ?? batch);
}

// ---------------------------------------------------------------- the pool

function render() {
  const names = latest.pools.map((pool) => pool.pool);
  if ($("pool").options.length !== names.length) {
    $("pool").replaceChildren(...names.map((name) => element("option", {}, name)));
    $("pool-field").hidden = names.length < 2;
  }
  const pool = latest.pools.find((each) => each.pool === poolName());
  if (pool) renderPool(pool);
  renderBatches();
}

function renderPool(pool) {
  const slots = Math.max(pool.max_concurrency, pool.in_flight);
  say($("slots"), `${count(pool.in_flight)} of ${count(pool.max_concurrency)}`);
  const shown = Math.min(slots, SLOTS_SHOWN);
  const row = $("slots-row");
  while (row.children.length > shown) row.lastChild.remove();
  while (row.children.length < shown) row.append(element("i"));
  [...row.children].forEach((each, i) => each.classList.toggle("busy", i < (pool.in_flight * shown) / slots));
  renderTokens(pool);
  const waiting = Object.values(pool.queue).reduce((sum, each) => sum + each, 0);
  const next = pool.blocked ? "stopped" : waiting === 0 ? "nothing waits" : null;
  const wait_s = pool.next_launch_s;
  const when = wait_s === null ? "when a slot is free" : wait_s < 0.05 ? "now" : `in ${duration(wait_s)}`;
  say($("next"), next ?? when);
  say($("next-note"), pool.blocked || (pool.waiting_for && waiting ? `waits for ${cause(pool.waiting_for)}` : ""));
  say($("throttled"), count(pool.throttled));
  const ratio = pool.attempts ? `${percent(pool.throttled / pool.attempts)} of ` : "of ";
  say($("throttled-note"), `${ratio}${counted(pool.attempts, "attempt")}`);
  renderQueue(pool.queue, waiting);
}

function renderTokens(pool) {
  const { tokens_in_use: used, tokens_budget: budget, tokens_limit: limit } = pool;
  const gauge = $("tokens-gauge");
  say($("tokens"), `${count(used)} of ${count(budget)}`);
  say($("tokens-note"), `limit ${count(limit)} per minute (${pool.window} window); the line marks the budget`);
  gauge.setAttribute("aria-valuenow", Math.round(used));
  gauge.setAttribute("aria-valuemax", Math.round(limit));
  gauge.setAttribute("aria-valuetext", `${count(used)} tokens of a budget of ${count(budget)}, limit ${count(limit)}`);
  gauge.querySelector(".fill").style.width = `${Math.min(100, (100 * used) / (limit || 1))}%`;
  gauge.querySelector(".mark").style.left = `${Math.min(100, (100 * budget) / (limit || 1))}%`;
}

function renderQueue(queue, waiting) {
  const causes = Object.entries(queue).sort((a, b) => b[1] - a[1]);
  const items = causes.map(([name, held]) => {
    const bar = element("span", { class: "bar", "aria-hidden": "true" }, element("span"));
    bar.firstChild.style.width = `${(100 * held) / waiting}%`;
    return element("li", {}, element("span", {}, `${count(held)} ${held === 1 ? "waits" : "wait"} for ${cause(name)}`), bar);
  });
  $("queue").replaceChildren(...(items.length ? items : [element("li", { class: "note" }, "Nothing waits.")]));
}

function renderPace(pool) {
  const step = (stepS = pool.series_s);
  const last = pool.series[pool.series.length - 1].at;
  const first = Math.max(pool.series[0].at, last - 900);
  const at = [];
  // At least two minutes, so that the first bar of a day is not as wide as the page.
  for (let time = Math.min(first, last - 120); time <= last; time += step) at.push(time);
  const found = new Map(pool.series.map((bucket) => [bucket.at, bucket]));
  const column = (name) => at.map((time) => found.get(time)?.[name] ?? 0);
  const launches = column("launches");
  const throttled = column("throttled");
  chart.show([at, launches, throttled]);
  const sum = (values) => values.slice(-60 / step).reduce((total, each) => total + each, 0);
  const text = `In the last minute ${counted(sum(launches), "launch", "es")} and ${counted(sum(throttled), "429")}`;
  say($("pace-note"), `${text}; each bar is ${step} s.`);
  $("pace").setAttribute("aria-label", `Launches and 429s over the last quarter of an hour. ${text}.`);
}

// ---------------------------------------------------------------- batches

/** Rows are changed in place, so that the focus stays where it is. */
function renderBatches() {
  const body = $("batches").tBodies[0];
  $("no-batches").hidden = listed.length > 0;
  $("batches").hidden = listed.length === 0;
  const kept = new Set(listed.map((batch) => batch.batch_id));
  for (const [id, row] of rows) {
    if (!kept.has(id)) {
      row.remove();
      rows.delete(id);
    }
  }
  listed.forEach((batch, i) => {
    let row = rows.get(batch.batch_id);
    if (!row) {
      row = newRow(batch);
      rows.set(batch.batch_id, row);
    }
    if (body.children[i] !== row) body.insertBefore(row, body.children[i] ?? null);
    fillRow(row, batch);
  });
}

function newRow(batch) {
  const id = batch.batch_id;
  const file = (kind) =>
    element(
      "a",
      { href: `/batches/${id}/${kind}`, download: `${id}-${kind}.jsonl`, "data-is": kind, "aria-label": `${kind} of ${id}`, onclick: fetchFile },
      kind === "results" ? "Results" : "Errors",
    );
  const act = (verb) =>
    element("button", { type: "button", "data-verb": verb, "aria-label": `${VERBS[verb]} ${id}`, onclick: () => steer(id, verb) }, VERBS[verb]);
  const progress = element("progress", { max: "1", value: "0", "aria-label": `Progress of ${id}` });
  const waves = element("details", { class: "waves", hidden: batch.via === "live" }, element("summary"), element("ul"));
  const way = batch.via === "live" ? [] : [element("span", { class: "note" }, WAYS[batch.via])];
  const link = element("a", { href: `#what-if?batch=${id}`, "aria-label": `What if, for ${id}` }, "What if");
  return element(
    "tr",
    {},
    element("th", { scope: "row", class: "id", title: id }, ...(batch.name ? [batch.name] : []), element("span", { class: "short" }, `…${id.slice(-6)}`), ...way),
    element("td", { "data-is": "state" }),
    element("td", {}, progress, element("span", { "data-is": "done", class: "note" }), waves),
    element("td", { "data-is": "flying", class: "number" }),
    element("td", { "data-is": "throttled", class: "number" }),
    element("td", { "data-is": "eta", class: "number" }),
    element("td", { class: "actions" }, act("pause"), act("resume"), act("cancel"), file("results"), file("errors"), link),
  );
}

function fillRow(row, batch) {
  const cell = (name) => row.querySelector(`[data-is=${name}]`);
  const over = OVER.includes(batch.state);
  const held = ["paused", "stopped"].includes(batch.state);
  say(cell("state"), batch.reason ? `${batch.state}: ${batch.reason}` : batch.state);
  row.querySelector("progress").value = batch.requests ? (batch.done + batch.failed) / batch.requests : 0;
  // Of a batch that was cancelled most of these were never sent.
  const failed = batch.failed ? `, ${count(batch.failed)} ${batch.state === "cancelled" ? "not done" : "failed"}` : "";
  say(cell("done"), `${count(batch.done)} of ${count(batch.requests)}${failed}`);
  if (batch.via !== "live") fillWaves(row.querySelector(".waves"), batch.waves);
  say(cell("flying"), count(batch.in_flight));
  say(cell("throttled"), count(batch.throttled));
  say(cell("eta"), over ? "" : held || batch.eta_s === null ? "not while held" : duration(batch.eta_s));
  cell("results").hidden = batch.done === 0;
  cell("errors").hidden = batch.failed === 0;
  const usable = { pause: !over && !held && batch.state !== "cancelling", resume: held, cancel: !over && batch.state !== "cancelling" };
  for (const button of row.querySelectorAll("button")) {
    const hide = !usable[button.dataset.verb];
    // A button that goes away under the focus hands it to the one that takes its place.
    if (hide && document.activeElement === button) queueMicrotask(() => row.querySelector("button:not([hidden]), a")?.focus());
    button.hidden = hide;
  }
}

/** The files at the Batch API, newest first; what was opened stays open. */
function fillWaves(box, waves) {
  const open = waves.filter((wave) => wave.stage !== "closed").length;
  const total = waves[waves.length - 1]?.wave ?? 0;
  say(box.querySelector("summary"), total ? `${counted(total, "wave")}${open ? `, ${count(open)} open` : ""}` : "no wave yet");
  const list = box.querySelector("ul");
  const texts = waves.map(waveText).reverse();
  while (list.children.length > texts.length) list.lastChild.remove();
  while (list.children.length < texts.length) list.append(element("li"));
  texts.forEach((text, i) => say(list.children[i], text));
}

function waveText(wave) {
  const stages = { planned: "to be uploaded", uploaded: "uploaded", ended: "to be collected" };
  const state = stages[wave.stage] ?? (wave.status.replaceAll("_", " ") || "submitted");
  const failed = wave.failed ? `, ${count(wave.failed)} failed` : "";
  const answered = wave.total ? `: ${count(wave.completed)} of ${count(wave.total)} answered${failed}` : "";
  return `${wave.wave}: ${counted(wave.requests, "request")} to ${wave.model}, ${state}${answered}`;
}

/** A link to a file: as it stands where no token is needed, else fetched with it. */
async function fetchFile(event) {
  try {
    await download(event);
  } catch (error) {
    say($("batch-said"), `Not loaded: ${error.message}`);
  }
}

async function steer(id, verb) {
  const batch = listed.find((each) => each.batch_id === id) ?? { batch_id: id };
  const short = `batch ${called(batch)}`;
  if (verb === "cancel") {
    const ends = WAYS[batch.via] ? "Waves at the provider are cancelled, their answers are kept" : "What is in flight ends";
    const text = `${ends}; everything else is recorded as cancelled. This cannot be undone.`;
    if (!(await confirmed(`Cancel ${short}?`, element("p", {}, text), "Cancel the batch"))) return;
  }
  try {
    const found = await ask(`/batches/${id}/${verb}`, { method: "POST" });
    overlay([found]);
    renderBatches();
    say($("batch-said"), `${short} is ${found.state}.`);
  } catch (error) {
    say($("batch-said"), `${VERBS[verb]} did not work: ${error.message}`);
  }
}

/** Only the cheapest mix is asked by when it must be done. */
function showBy() {
  $("start-by-field").hidden = $("start-via").value !== "auto";
}

async function startBatch(event) {
  event.preventDefault();
  const file = $("start-file").files[0];
  say($("batch-said"), `Sending ${file.name}.`);
  try {
    const via = $("start-via").value;
    const asked = new URLSearchParams({ name: $("start-name").value.trim(), via });
    if (via === "auto") asked.set("finish_by", $("start-by").value.trim());
    const made = await ask(`/batches?${asked}`, { method: "POST", body: file, type: "application/jsonl" });
    const when = made.forecast_finish_s === null ? "" : `, forecast to take ${duration(made.forecast_finish_s)}`;
    say($("batch-said"), `Started: ${counted(made.requests, "request")}${when}.`);
    event.target.reset();
    showBy();
    await refresh();
  } catch (error) {
    say($("batch-said"), `Not started: ${error.message}`);
  }
}
