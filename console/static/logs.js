// A log: it is read again while it is followed, stays at its end unless the reader has scrolled up, and is searched.
import { replaceParts } from "./fragments.js";

const EVERY = 3000;

export function handleLogs() {
  const follow = document.getElementById("follow");
  const search = document.getElementById("log-search");
  const log = () => document.querySelector(".log");
  if (log()) log().scrollTop = log().scrollHeight;

  async function readAgain() {
    const old = log();
    const isAtEnd = !old || old.scrollTop + old.clientHeight >= old.scrollHeight - 20;
    if (follow.checked && !document.hidden && isAtEnd) { // else the reader reads
      const address = new URL(location.href);
      address.searchParams.set("automatic", ""); // an open page must not keep the session
      const answer = await fetch(address, { headers: { Accept: "text/html" } }).catch(() => null);
      if (answer?.ok && !answer.redirected) {
        replaceParts(await answer.text(), ["live-part"], true);
        if (log()) log().scrollTop = log().scrollHeight;
        mark();
      }
    }
    setTimeout(readAgain, EVERY); // after the answer: the host may be slow
  }
  setTimeout(readAgain, EVERY);

  function mark() {
    const element = log();
    if (!element) return;
    const text = element.textContent, wanted = search.value.toLowerCase();
    if (!wanted) { element.textContent = text; return; }
    const parts = document.createDocumentFragment();
    const lower = text.toLowerCase();
    let at = 0, found, count = 0;
    while ((found = lower.indexOf(wanted, at)) >= 0 && count++ < 1000) {
      const marked = document.createElement("mark");
      marked.textContent = text.slice(found, found + wanted.length);
      parts.append(text.slice(at, found), marked);
      at = found + wanted.length;
    }
    parts.append(text.slice(at));
    element.replaceChildren(parts);
    element.querySelector("mark")?.scrollIntoView({ block: "center" });
  }
  search.addEventListener("input", mark);
}
