// Asks the router for its state every two seconds and shows it. Keeps a key in this tab only.

import { ago, bar, bars, bytes, chart, legend, make, number, percent, put, seconds, short, table } from "./draw.js";

const EVERY_MS = 2000;
const KEY = "antefix-key";
const byId = (id) => document.getElementById(id);
let chosen = "", paused = false, timer = 0, last = null;

async function refresh() {
  clearTimeout(timer);
  try {
    const key = sessionStorage.getItem(KEY);
    const answer = await fetch(`data?seconds=${byId("span").value}`, key ? { headers: { authorization: `Bearer ${key}` } } : {});
    if (answer.status === 401 || answer.status === 403) return ask(key, answer.status);
    if (!answer.ok) throw new Error(`the router answered ${answer.status}`);
    last = await answer.json();
    byId("ask").hidden = true;
    byId("all").hidden = false;
    say(paused ? "Paused." : "");
    show(last);
  } catch (error) {
    say(`No news: ${error.message}. ${last ? "What is below is older. " : ""}Trying again.`, true);
  }
  if (!paused) timer = setTimeout(refresh, EVERY_MS);
}

function say(text, bad = false) {
  const state = byId("state");
  if (state.textContent !== text) state.textContent = text;
  state.classList.toggle("bad", bad);
}

function ask(key, status) {
  const refused = status === 403 ? "This key has not the scope admin." : "This key is not known.";
  byId("refused").textContent = key ? refused : "";
  sessionStorage.removeItem(KEY);
  byId("all").hidden = true;
  byId("ask").hidden = false;
  byId("about").textContent = "";
  byId("key").focus();
}

function show(data) {
  byId("about").textContent = `${data.version} · model ${data.model} · up since ${new Date(1000 * data.started_at).toLocaleString()}`;
  tiles(data);
  overTime(data);
  roles(data);
  requests(data);
  forest(data);
  store(data);
  tenants(data);
}

function tiles(data) {
  const hour = data.over[3600], minute = data.over[60], total = data.total;
  const down = data.workers.filter((worker) => !worker.serving || worker.draining).length;
  const currency = data.requests.find((request) => request.currency)?.currency ?? "";
  const money = (value) => (currency ? `${value.toPrecision(3)} ${currency}` : "–");
  const rows = [
    ["Hit rate, 1 hour", percent(hour.hit_tokens, hour.prompt_tokens), `1 min ${percent(minute.hit_tokens, minute.prompt_tokens)}`],
    ["Tokens not computed", short(total.hit_tokens), `of ${short(total.prompt_tokens)} since the start`],
    ["Saved by hits", money(total.saved), `charged ${money(total.charged)}`],
    ["Time to first token", hour.num_with_ttft ? seconds(hour.ttft_s / hour.num_with_ttft) : "–", "mean of 1 hour"],
    ["Requests running", number(data.running), `${number(minute.requests)} ended in 1 min`],
    ["Failed, 1 hour", number(hour.failed), `${number(data.refused)} refused since the start`],
    ["Workers", `${data.workers.length - down} of ${data.workers.length}`, down ? `${down} not serving` : "all serve"],
  ];
  put("tiles", ...rows.map(([name, value, note]) => make("div", {}, make("dt", {}, name), make("dd", {}, value, make("small", {}, note)))));
}

function overTime(data) {
  // Nothing is known from before the start; a lone point would make no line.
  const points = data.series.filter((point, index, all) => point.at >= data.started_at || index >= all.length - 2);
  const per = points.length > 1 ? points[1].at - points[0].at : 10;
  const rate = points.map((point) => (point.prompt_tokens ? (100 * point.hit_tokens) / point.prompt_tokens : null));
  const ttft = points.map((point) => (point.num_with_ttft ? (1000 * point.ttft_s) / point.num_with_ttft : null));
  const empty = "No request has ended in this span.";
  put("c-rate", chart(points, [{ values: rate, name: "hit rate" }], { most: 100, show: (value) => `${value.toFixed(0)}%`, empty }));
  put("c-tokens", chart(points, [
    { values: points.map((point) => point.hit_tokens / per), name: "hit" },
    { values: points.map((point) => (point.prompt_tokens - point.hit_tokens) / per), class: "other", name: "missed" },
  ], { empty }), legend([["hit", "hit"], ["mark", "missed"]]));
  put("c-ttft", chart(points, [{ values: ttft, name: "time to first token" }], { empty }));
  let sum = 0;
  const saved = points.map((point) => (sum += point.saved));
  put("c-saved", chart(points, [{ values: saved, name: "saved" }], {
    show: (value) => value.toPrecision(3), empty: "No request in this span had a price: name a rate card with --ratecards.",
  }));
  const missed = Object.entries(data.miss_tokens).map(([reason, count]) => [reason.replaceAll("_", " "), count, short(count)]);
  put("c-miss", bars(missed, "miss", "Nothing has missed yet."));
}

function roles(data) {
  const state = (worker) => worker.draining ? "drains" : worker.serving ? "serves" : "does not answer";
  put("t-roles", table(`Workers of this router, placed by the policy ${data.policy}`, [
    ["role", (worker) => worker.role, true],
    ["address", (worker) => worker.address, true],
    ["health", (worker) => make("span", { class: worker.serving ? "good" : "bad" }, state(worker)), true],
    ["requests", (worker) => number(worker.requests)],
    ["tokens queued", (worker) => number(worker.tokens_queued)],
    ["served", (worker) => number(worker.served)],
    ["memory known", (worker) => (worker.memory_known ? "yes" : "guessed"), true],
    ["version", (worker) => worker.version || "not told", true],
    ["set-up", (worker) => worker.setup || "not heard", true],
  ], data.workers, "No worker has registered."));
}

function requests(data) {
  const select = (request) => make("button", {
    type: "button", "aria-expanded": String(chosen === request.id), "aria-controls": "one",
    onclick: () => { chosen = chosen === request.id ? "" : request.id; requests(last); if (chosen) byId("one").focus(); },
  }, request.id.length > 16 ? `${request.id.slice(0, 16)}…` : request.id);
  const focused = document.activeElement?.dataset?.request;
  put("t-requests", table("The newest first", [
    ["request", (request) => { const button = select(request); button.dataset.request = request.id; return button; }, true],
    ["ended", (request) => ago(data.at - request.at)],
    ["tenant", (request) => request.tenant || "–", true],
    ["status", (request) => make("span", { class: ["failed", "crashed"].includes(request.status) ? "bad" : "" }, request.status), true],
    ["prompt", (request) => number(request.prompt_tokens)],
    ["hit", (request) => percent(request.hit_tokens, request.prompt_tokens)],
    ["", (request) => bar([["hit", request.hit_tokens], ["miss", request.miss_tokens]], request.prompt_tokens, "hit and missed")],
    ["plan", (request) => request.plan || "–", true],
    ["first miss", (request) => request.miss_reason.replaceAll("_", " ") || "–", true],
    ["first token", (request) => (request.ttft_s ? seconds(request.ttft_s) : "–")],
    ["output", (request) => number(request.output_tokens)],
  ], data.requests.slice(0, 25), "No request has ended since this router started."));
  if (focused) document.querySelector(`[data-request="${CSS.escape(focused)}"]`)?.focus();
  one(data.requests.find((request) => request.id === chosen));
}

function one(request) {
  byId("one").hidden = !request;
  if (!request) return;
  const life = request.life;
  const parts = [
    ["third", life.wait_s, "waiting, placing and handing over"], ["mark", life.restore_s, "restoring"],
    ["miss", life.compute_s, "computing what missed"], ["hit", life.output_s, "output"],
  ];
  const whole = parts.reduce((sum, [, value]) => sum + value, 0);
  put("one",
    make("h3", {}, `Request ${request.id}, attempt ${request.attempt}`),
    bar(parts, whole, parts.map(([, value, name]) => `${name} ${seconds(value)}`).join(", ")),
    legend(parts.map(([kind, value, name]) => [kind, `${name} ${seconds(value)}`])),
    make("ul", {}, ...request.explained.map((line) => make("li", {}, line)),
      life.restore_s ? make("li", {}, `The planner predicted ${seconds(life.predicted_s)} for the restore; ${bytes(life.bytes_read)} were read.`) : null,
      request.currency ? make("li", {}, `Charged ${request.price} ${request.currency}; its hits saved ${request.saved}.`) : null));
}

function forest(data) {
  const runs = data.forest.map((run) => ({ ...run }));
  runs.forEach((run) => {
    const parent = run.parent === null ? null : runs[run.parent];
    run.depth = parent ? parent.depth + 1 : 0;
    run.start = parent ? parent.start + parent.tokens : 0;
  });
  const most = Math.max(...runs.map((run) => run.start + run.tokens), 1);
  put("t-forest", table("Prefixes that this router has seen, the most shared ones", [
    ["run", (run) => `${" ".repeat(2 * Math.min(run.depth, 12))}${run.name}`, true],
    ["where in the prompt", (run) => place(run, most), true],
    ["tokens", (run) => number(run.tokens)],
    ["from", (run) => number(run.start)],
    ["prompts", (run) => number(run.prompts)],
    ["tenants", (run) => number(run.tenants)],
    ["used", (run) => ago(data.at - run.used_at)],
    ["checkpoints", (run) => (run.checkpoints.length ? number(run.checkpoints.length) : "")],
  ], runs.slice(0, 60), "No prompt with a whole block has come yet."));
}

function place(run, most) {
  const kind = run.prompts > 1 ? "hit" : "third";
  const box = bar([["none", run.start], [kind, run.tokens]], most, `tokens ${number(run.start)} to ${number(run.start + run.tokens)}`);
  const picture = box.firstChild;
  picture.firstChild.setAttribute("fill", "none");
  for (const at of run.checkpoints) {
    const mark = picture.lastChild.cloneNode();
    for (const [name, value] of [["class", "mark"], ["x", (1000 * (run.start + at)) / most - 3], ["width", 6]]) mark.setAttribute(name, value);
    picture.append(mark);
  }
  return box;
}

function store(data) {
  const found = data.store;
  if (!found.kinds) { put("t-kinds", make("p", { class: "empty" }, `The store was not read: ${found.error}`)); put("t-stores"); put("c-ages"); put("c-tiers"); return; }
  put("t-kinds", table("Of the whole store", [
    ["kind", (kind) => kind.kind.replaceAll("_", " "), true], ["records", (kind) => number(kind.num_records)],
    ["on disk", (kind) => bytes(kind.stored_bytes)], ["as read", (kind) => bytes(kind.payload_bytes)],
  ], found.kinds, "It holds nothing."));
  put("t-stores", (found.stores || []).length ? table("Stores", [
    ["store", (store) => store.name, true], ["answers", (store) => store.answers ? "yes" : "no"],
    ["failed", (store) => number(store.failures)], ["records", (store) => number(store.records)],
    ["used", (store) => bytes(store.used_bytes)], ["of", (store) => bytes(store.budget_bytes)],
    ["evicted", (store) => number(store.evictions)], ["stores nothing because", (store) => store.stopped],
  ], found.stores, "") : make("p", { class: "empty" }, "There is one store."));
  const named = (bound, index) => bound.up_to_s === null ? "longer ago" : ["1 minute", "10 minutes", "1 hour", "1 day"][index];
  put("c-ages", bars(found.ages.map((bound, index) => [named(bound, index), bound.tokens, short(bound.tokens)]), "hit", "No prefix was seen yet."));
  const tiers = { "a worker's memory": 0, "the store": 0, "computed": 0 };
  for (const request of data.requests) {
    tiers["a worker's memory"] += request.hit_memory_tokens;
    const stored = Object.entries(request.hit_tiers || {}).filter(([tier]) => tier !== "memory");
    if (stored.length < 2 && !stored.some(([tier]) => tier.includes(":"))) tiers["the store"] += request.hit_store_tokens;
    else for (const [tier, tokens] of stored) tiers[tier] = (tiers[tier] || 0) + tokens;
    tiers.computed += request.miss_tokens;
  }
  put("c-tiers", bars(Object.entries(tiers).map(([name, count]) => [name, count, short(count)]), "mark", "No request has ended yet."));
  const limit = found.limit_bytes || found.budget_bytes;
  byId("store-note").textContent = `${found.version ? `Version ${found.version}. ` : ""}${bytes(found.used_bytes)}${limit ? ` of ${bytes(limit)}` : ""} used; ${bytes(found.free_bytes)} free on its disk; `
    + `${number(found.evictions)} evicted, ${number(found.corrupt)} found damaged.${found.stopped ? ` It stores nothing now: ${found.stopped}.` : ""}${found.error ? ` Not read again: ${found.error}` : ""}`;
}

function tenants(data) {
  const limit = (each) => {
    const parts = [];
    if (each.tokens !== null) parts.push(`${short(each.used_tokens)} of ${short(each.tokens)} tokens`);
    if (each.money !== null) parts.push(`${each.used_money} of ${each.money}`);
    return `${parts.join(", ")} per ${each.window}`;
  };
  put("t-tenants", table("Since this router started, the busiest first", [
    ["tenant", (tenant) => tenant.tenant || "without a key", true],
    ["requests", (tenant) => number(tenant.requests)],
    ["prompt tokens", (tenant) => number(tenant.prompt_tokens)],
    ["hit rate", (tenant) => percent(tenant.hit_tokens, tenant.prompt_tokens)],
    ["output tokens", (tenant) => number(tenant.output_tokens)],
    ["charged", (tenant) => (tenant.charged || tenant.saved ? tenant.charged.toPrecision(4) : "–")],
    ["saved", (tenant) => (tenant.charged || tenant.saved ? tenant.saved.toPrecision(4) : "–")],
    ["at once", (tenant) => (tenant.requests_max === null ? "no limit" : number(tenant.requests_max))],
    ["limits", (tenant) => tenant.limits.map(limit).join("; ") || "none", true],
  ], data.tenants, "Nobody has asked for anything yet."));
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, byId("key").value.trim());
  byId("key").value = "";
  refresh();
});
byId("span").addEventListener("change", refresh);
byId("pause").addEventListener("click", () => {
  paused = !paused;
  byId("pause").setAttribute("aria-pressed", String(paused));
  byId("pause").textContent = paused ? "Go on" : "Pause";
  refresh();
});
byId("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
refresh();
