// Where a text is in a log. Only offsets are kept: a log may have a million matches, and lines of a million characters.

export function findMatches(text, wanted) {
  const starts = [], ends = [];
  let lines = 0, lineEnd = -1;
  if (!wanted) return { starts, ends, lines };
  const pattern = new RegExp(wanted.replace(/[.*+?^${}()|[\]\\/]/g, "\\$&"), "giu");
  for (let found = pattern.exec(text); found; found = pattern.exec(text)) {
    starts.push(found.index);
    ends.push(pattern.lastIndex);
    if (found.index < lineEnd) continue;
    lines += 1;
    lineEnd = text.indexOf("\n", found.index);
    if (lineEnd < 0) lineEnd = text.length;
  }
  return { starts, ends, lines };
}

// The first match at an offset or after it, else the last one.
export function nextMatch(starts, offset) {
  let low = 0, high = starts.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (starts[middle] < offset) low = middle + 1;
    else high = middle;
  }
  return Math.min(low, starts.length - 1);
}

// By how much the text of a log has moved in a newer text of it, which may lack its beginning; null: it is another text.
export function findShift(old, fresh) {
  if (fresh.startsWith(old)) return 0;
  const end = old.slice(-1000);
  const at = fresh.lastIndexOf(end);
  return at < 0 ? null : at - (old.length - end.length);
}
