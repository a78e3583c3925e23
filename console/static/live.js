// The stream of changes. A connection without a beat for some seconds is lost, and is made again.
import { replaceParts } from "./fragments.js";
import { fill } from "./texts.js";

const QUIET = 5000; // milliseconds without a beat after which the page says that it is not up to date
const PARTS = ["banners", "counts", "list", "live-part", "limits", "charts"];
const NOW_EVERY = 1900, ALL_EVERY = 30000; // milliseconds after which a page about this moment is read again
const SLOT = 4, BAR = 3, SLOTS = 50;
const BARS = { "+": ["ok", 4, 14], "-": ["bad", 0, 18], "?": ["unknown", 9, 9] };
const texts = document.body.dataset;

let source, retry, lastBeat = Date.now(), delay = 1000, isFetching = false, isStale = false, hasEnded = false, refreshedAt = Date.now(), completeAt = Date.now();

export function connect() {
  open();
  setInterval(checkBeat, 1000);
  // Six connections per server is all that a browser has: hidden pages give theirs back.
  document.addEventListener("visibilitychange", () => {
    clearTimeout(retry);
    if (document.hidden) source?.close();
    else { lastBeat = Date.now(); open(); refresh(); }
  });
}

function open() {
  source?.close();
  if (hasEnded) return;
  source = new EventSource(`${texts.root}stream?version=${texts.version ?? 0}&automatic`);
  source.addEventListener("change", (event) => { beat(); apply(JSON.parse(event.data)); });
  source.addEventListener("beat", beat);
  source.onerror = () => {
    if (source.readyState !== EventSource.CLOSED) return; // the browser tries again itself
    checkSession();
    retry = setTimeout(open, delay + Math.random() * 1000);
    delay = Math.min(delay * 2, 8000);
  };
}

function beat() {
  lastBeat = Date.now();
  delay = 1000;
  if (isStale) { isStale = false; refresh(); }
  show("", "");
  if (document.querySelector("[data-now]") && !isFetching && Date.now() - refreshedAt >= NOW_EVERY) refresh(Date.now() - completeAt < ALL_EVERY);
}

function checkBeat() {
  if (hasEnded || document.hidden || Date.now() - lastBeat < QUIET) return;
  if (!isStale) document.getElementById("content").classList.add("stale");
  isStale = true;
  const since = new Date(lastBeat).toLocaleTimeString([], { hour12: false });
  show(`${texts.liveLost} · ${fill(texts.liveSince, since)}`, "lost");
}

function show(text, kind) {
  const live = document.getElementById("live");
  if (live.textContent !== text) live.textContent = text;
  live.className = `live ${kind}`;
  if (!kind) document.getElementById("content").classList.remove("stale");
}

async function checkSession() {
  const answer = await fetch(`${texts.root}api/v1/identity?automatic`).catch(() => null);
  if (answer?.status !== 401) return;
  hasEnded = true;
  clearTimeout(retry);
  const live = document.getElementById("live");
  live.className = "live lost";
  const link = Object.assign(document.createElement("a"), { href: location.href, textContent: texts.liveSignIn });
  live.replaceChildren(`${texts.liveEnded} `, link);
  source.close();
}

function apply(change) {
  texts.version = change.version;
  if (change.reload) { refresh(); return; }
  const list = document.getElementById("list");
  if (document.querySelector("[data-now]")) { // which shows no services
    if (change.head) refresh();
    return;
  }
  if (!list) {
    if (change.head || Object.keys(change.rows ?? {}).length || isConcerned(change)) refresh();
    return;
  }
  let hasMoved = change.head;
  for (const [id, html] of Object.entries(change.rows ?? {})) {
    const old = document.getElementById(`s-${id}`);
    if (!old || old.dataset.state !== change.states[id]) hasMoved = true;
    if (old) replaceRow(old, html);
  }
  for (const [id, [recent, latency]] of Object.entries(change.results ?? {})) {
    const row = document.getElementById(`s-${id}`);
    if (row) measure(row, recent, latency);
  }
  if (hasMoved) refresh();
}

function isConcerned(change) {
  const results = change.results ?? {};
  const id = location.pathname.match(/services\/([^/]+)$/)?.[1];
  if (id && decodeURIComponent(id) in results) return true;
  return [...document.querySelectorAll("[data-shows-service]")].some((each) => each.dataset.showsService in results);
}

function replaceRow(old, html) {
  const template = document.createElement("template");
  template.innerHTML = html.trim();
  const hadFocus = old.contains(document.activeElement);
  const fresh = template.content.firstElementChild;
  old.replaceWith(fresh);
  if (hadFocus) fresh.querySelector("a")?.focus();
}

function measure(row, recent, latency) {
  const shown = latency === null ? "" : latency < 9.9995 ? `${Math.round(latency * 1000)} ms` : `${latency.toFixed(1)} s`;
  row.querySelector(".latency").textContent = shown;
  const svg = row.querySelector(".strip");
  const counts = ["+", "-", "?"].map((result) => recent.split(result).length - 1);
  svg.setAttribute("aria-label", fill(texts.strip, ...counts));
  const padded = recent.slice(-SLOTS).padStart(SLOTS);
  const paths = {};
  [...padded].forEach((result, slot) => {
    const [kind, top, height] = BARS[result] ?? ["none", 8, 2];
    paths[kind] = `${paths[kind] ?? ""}M${slot * SLOT} ${top}h${BAR}v${height}h-${BAR}z`;
  });
  svg.replaceChildren(...Object.entries(paths).map(([kind, d]) => {
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    path.setAttribute("class", kind);
    path.setAttribute("d", d);
    return path;
  }));
}

function findState() {
  return document.querySelector("[data-now]")?.dataset.state;
}

// `isPartial`: only what is about this moment, for pages with such a part.
export async function refresh(isPartial = false) {
  if (isFetching) { isFetching = "again"; return; }
  isFetching = true;
  refreshedAt = Date.now();
  if (!isPartial) completeAt = refreshedAt;
  try {
    const address = new URL(location.href);
    address.searchParams.set("automatic", "");
    if (isPartial) address.searchParams.set("now", "");
    const answer = await fetch(address, { headers: { Accept: "text/html" } });
    const before = findState();
    if (answer.ok && !answer.redirected) {
      replaceParts(await answer.text(), PARTS);
      if (isPartial && findState() !== before) isFetching = "again";
    } else if (answer.status === 404) { // such as a service that was removed from the inventory
      hasEnded = true;
      source.close();
      document.getElementById("content").classList.add("stale");
      show(texts.liveGone, "lost");
    }
  } catch { /* the beat shows that the connection is lost */ }
  setTimeout(() => {
    const again = isFetching === "again"; // also if a change came during the pause
    isFetching = false;
    if (again) refresh();
  }, 300);
}
