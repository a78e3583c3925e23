// How long ago something was, in the words of the page, kept up to date.
import { fill } from "./texts.js";

const units = document.body.dataset.units.split("|");

function format(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) return fill(units[0], whole);
  if (whole < 3600) return fill(units[1], Math.floor(whole / 60), whole % 60);
  if (whole < 86400) return fill(units[2], Math.floor(whole / 3600), Math.floor((whole % 3600) / 60));
  return fill(units[3], Math.floor(whole / 86400), Math.floor((whole % 86400) / 3600));
}

export function keepAges() {
  setInterval(() => {
    if (document.hidden) return;
    const now = Date.now() / 1000;
    for (const each of document.querySelectorAll(".age[data-since]")) {
      // The clock of the server decides: the difference of both clocks is known since the page was made.
      each.shift ??= now - Number(each.dataset.since) - Number(each.dataset.age);
      const text = format(now - Number(each.dataset.since) - each.shift);
      if (each.textContent !== text) each.textContent = text;
    }
  }, 1000);
}
