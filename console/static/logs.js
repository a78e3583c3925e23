// A log: it is read again while it is followed, stays at its end unless the reader has scrolled up, and is searched.
import { replaceParts } from "./fragments.js";
import { findMatches, findShift, nextMatch } from "./matches.js";
import { fill } from "./texts.js";

const EVERY = 3000;
const MARKED = 200; // matches before the current one, and after it, that are marked

export function handleLogs() {
  const follow = document.getElementById("follow");
  const search = document.getElementById("log-search");
  const found = document.getElementById("log-found");
  const again = document.getElementById("log-again");
  const log = () => document.querySelector(".log");
  let matches = findMatches("", ""), current = -1;

  // A parser makes several nodes of a long text.
  log()?.normalize();
  if (log()) log().scrollTop = log().scrollHeight;

  async function follows() {
    if (follow.checked && !document.hidden && isAtEnd(log())) { // else the reader reads
      const address = new URL(location.href);
      address.searchParams.set("automatic", ""); // an open page must not keep the session
      await readAgain(address);
    }
    setTimeout(follows, EVERY); // after the answer: the host may be slow
  }
  setTimeout(follows, EVERY);

  async function readAgain(address) {
    const answer = await fetch(address, { headers: { Accept: "text/html" } }).catch(() => null);
    if (!answer?.ok || answer.redirected) return false;
    const text = await answer.text();
    const old = log(), place = findPlace(old), before = old?.textContent ?? "";
    replaceParts(text, ["live-part"], true);
    const fresh = log();
    fresh?.normalize();
    const shift = findShift(before, fresh?.textContent ?? "");
    find(shift !== null && current >= 0 ? matches.starts[current] + shift : null);
    if (fresh) keepPlace(fresh, place, shift);
    return true;
  }
  again.addEventListener("click", async (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return; // into another window
    event.preventDefault();
    if (!await readAgain(again.href)) location.assign(again.href);
  });

  // The newest match becomes the current one, or the first from an offset on.
  function find(from = null) {
    matches = findMatches(log()?.textContent ?? "", search.value);
    current = from === null ? matches.starts.length - 1 : nextMatch(matches.starts, from);
    show();
  }

  function show() {
    const count = matches.starts.length, status = found.querySelector("[role=status]");
    const values = [current + 1, count, matches.lines];
    found.hidden = !search.value;
    status.textContent = count ? fill(status.dataset.some, ...values) : status.dataset.none;
    found.querySelectorAll("button").forEach((each) => { each.disabled = !count; });
    mark(log(), matches, current);
  }

  function go(step) {
    const count = matches.starts.length;
    if (!count) return;
    current = (current + step + count) % count;
    show();
    reveal(log(), matches, current);
  }

  search.addEventListener("input", () => {
    find(matches.starts[current] ?? null);
    reveal(log(), matches, current);
  });
  search.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.isComposing) return;
    event.preventDefault();
    go(event.shiftKey ? -1 : 1);
  });
  found.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) go(Number(button.dataset.step));
  });
}

function isAtEnd(log) {
  return !log || log.scrollTop + log.clientHeight >= log.scrollHeight - 20;
}

function rangeOf(log, start, end) {
  const range = document.createRange();
  range.setStart(log.firstChild, start);
  range.setEnd(log.firstChild, end);
  return range;
}

// Highlights are drawn over the text: elements around matches would have the browser lay out the log again.
function mark(log, { starts, ends }, current) {
  if (!globalThis.Highlight) return; // an old browser
  CSS.highlights.clear();
  if (!log || current < 0) return;
  const near = starts.slice(Math.max(0, current - MARKED), current + MARKED);
  const first = Math.max(0, current - MARKED);
  CSS.highlights.set("found", new Highlight(...near.map((start, n) => rangeOf(log, start, ends[first + n]))));
  const one = new Highlight(rangeOf(log, starts[current], ends[current]));
  one.priority = 1;
  CSS.highlights.set("current", one);
}

function reveal(log, { starts, ends }, current) {
  if (!log || current < 0) return;
  const box = rangeOf(log, starts[current], ends[current]).getBoundingClientRect();
  log.scrollTop += box.top - log.getBoundingClientRect().top - (log.clientHeight - box.height) / 2;
}

// Where the reader is: the offset of the text at the upper edge, and where that is drawn.
function findPlace(log) {
  if (!log || isAtEnd(log)) return null;
  const { left, top } = log.getBoundingClientRect();
  const x = left + 16, y = Math.max(top, 0) + 16; // within the padding's inner edge
  const at = document.caretPositionFromPoint?.(x, y) ?? document.caretRangeFromPoint?.(x, y);
  const node = at?.offsetNode ?? at?.startContainer;
  if (node !== log.firstChild) return { scrollTop: log.scrollTop };
  const offset = at.offset ?? at.startOffset;
  return { offset, y: rangeOf(log, offset, offset).getBoundingClientRect().top, scrollTop: log.scrollTop };
}

function keepPlace(log, place, shift) {
  log.scrollTop = place === null ? log.scrollHeight : place.scrollTop;
  if (place?.offset === undefined || shift === null || !log.firstChild) return;
  const offset = Math.max(0, place.offset + shift);
  log.scrollTop += rangeOf(log, offset, offset).getBoundingClientRect().top - place.y;
}
