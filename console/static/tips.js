// What is under the pointer, or was tapped: a check of a strip, or the values of a chart.
const SLOTS = 50;
const FRESH = 3000; // milliseconds for which the checks of a service are not read again
const tip = Object.assign(document.createElement("div"), { className: "tip", hidden: true });
const known = new Map(); // the checks of each service, with when they were read
let asked = 0;

export function showTips() {
  tip.setAttribute("role", "status");
  document.body.append(tip);
  for (const kind of ["pointermove", "pointerdown"]) {
    document.addEventListener(kind, (event) => {
      const drawn = event.target instanceof Element ? event.target.closest(".checks, .chart") : null;
      if (!drawn) hide();
      else if (drawn.matches(".chart")) showValues(drawn, event);
      else showCheck(drawn, event);
    });
  }
  document.addEventListener("scroll", hide, { passive: true, capture: true });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
}

function hide() {
  asked += 1;
  tip.hidden = true;
  document.querySelectorAll(".cursor[d]").forEach((each) => each.removeAttribute("d"));
}

function show(lines, event) {
  tip.replaceChildren(...lines.map((text) => Object.assign(document.createElement("div"), { textContent: text })));
  tip.hidden = false;
  tip.style.left = `${Math.max(4, Math.min(event.clientX + 12, innerWidth - tip.offsetWidth - 8))}px`;
  const below = event.clientY + 16;
  tip.style.top = `${below + tip.offsetHeight > innerHeight ? event.clientY - tip.offsetHeight - 12 : below}px`;
}

async function showCheck(drawn, event) {
  const svg = drawn.querySelector("svg");
  if (!svg) return;
  const { left, width } = svg.getBoundingClientRect();
  const back = SLOTS - 1 - Math.max(0, Math.min(SLOTS - 1, Math.floor(((event.clientX - left) / width) * SLOTS)));
  const turn = ++asked;
  const checks = await readChecks(drawn.dataset.checks);
  if (turn !== asked) return; // the pointer is elsewhere
  if (checks[back]) show(checks[back], event);
  else hide();
}

async function readChecks(address) {
  const before = known.get(address);
  if (before && Date.now() - before.at < FRESH) return before.checks;
  const checks = fetch(`${address}?automatic`).then(async (answer) => {
    if (!answer.ok) return [];
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    return [...page.querySelectorAll("tbody tr")].map((row) => [...row.cells].map((cell) => cell.textContent));
  }).catch(() => []);
  known.set(address, { at: Date.now(), checks });
  return checks;
}

function showValues(svg, event) {
  const { left, width } = svg.getBoundingClientRect();
  const start = Number(svg.dataset.start), end = Number(svg.dataset.end);
  const wanted = start + ((event.clientX - left) / width) * (end - start);
  svg.parsed ??= JSON.parse(svg.dataset.lines);
  let at = null;
  const lines = svg.parsed.map(({ name, points }) => {
    const nearest = points.reduce((best, each) => (Math.abs(each[0] - wanted) < Math.abs(best[0] - wanted) ? each : best), points[0]);
    if (!nearest || Math.abs(nearest[0] - wanted) > (end - start) / 24) return "";
    at ??= nearest[0];
    return `${name}: ${format(nearest[1], svg.dataset.unit)}`;
  }).filter(Boolean);
  if (at === null) { hide(); return; }
  const x = ((at - start) / (end - start)) * svg.viewBox.baseVal.width;
  svg.querySelector(".cursor").setAttribute("d", `M${x.toFixed(1)} 0v${svg.viewBox.baseVal.height}`);
  const time = new Date(at * 1000).toLocaleString("sv", { timeZone: document.body.dataset.zone });
  show([time, ...lines], event);
}

function format(value, unit) {
  if (unit === "ratio") return `${Math.round(value * 100)} %`;
  if (unit === "per_minute") return document.body.dataset.perMinute.replace("{0}", value < 100 ? Number(value.toPrecision(3)) : Math.round(value).toLocaleString("en"));
  return value < 9.9995 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(1)} s`;
}
