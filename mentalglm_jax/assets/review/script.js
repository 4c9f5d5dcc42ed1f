"use strict";
// Everything from the data goes in as text, never as markup. Ratings stand in a Map, for an item's id may be any word
// ("__proto__", "constructor"): id -> { scale: 0..3, comment, when }, "when" the time of its last change.
const data = JSON.parse(document.getElementById("data").textContent);
const base = "mentalglm-review-" + data.form;
const $ = id => document.getElementById(id);
const fieldsets = [...document.querySelectorAll("fieldset[data-scale]")];
let state = { rater: "", at: 0 };
let ratings = new Map();
let scale = 0;

// What is kept is of one rater: of a name in any spelling. Nobody sees or goes on with another one's ratings.
const who = () => state.rater.trim();
const keyOf = name => base + "-" + name.normalize("NFKC").toLowerCase().split(/\s+/u).filter(Boolean).join(" ");
function keptAt(place) {
  try {
    const kept = JSON.parse(localStorage.getItem(place));
    return kept && kept.ratings && typeof kept.ratings === "object" ? kept : null;
  } catch { return null; /* nothing kept, or storage is off */ }
}
function adopt() {
  // An earlier version of this form kept one set for all: it is of the one whose name stands in it.
  const old = keptAt(base), name = String(old?.rater ?? "").trim();
  if (!name) return;
  try {
    if (!keptAt(keyOf(name))) localStorage.setItem(keyOf(name), JSON.stringify(old));
    localStorage.removeItem(base);
  } catch { /* it stays where it is */ }
}
function enter(name) {
  const kept = name.trim() ? keptAt(keyOf(name)) : null;
  ratings = new Map(Object.entries(kept?.ratings ?? {}).filter(([, rating]) => rating && typeof rating === "object"));
  state = { rater: name, at: Number(kept?.at) };
  if (!(Number.isInteger(state.at) && state.at >= 0 && state.at < data.items.length)) state.at = 0;
  try { sessionStorage.setItem(base, name); } catch { /* a reload asks for the name again */ }
  for (const set of fieldsets) set.disabled = !who();
  $("comment").disabled = !who();
  $("saved").textContent = who() ? "" : data.words.name_first;
  show(state.at);
}
function merge(kept) {
  // Another window of the same rater keeps its ratings in the same place. Of every item the newest is right; one whose
  // ratings were taken back stays, with its time alone, so that an old window does not bring them back.
  for (const [id, theirs] of Object.entries(kept?.ratings ?? {})) {
    const newer = theirs && typeof theirs === "object" && (theirs.when ?? 0) > (ratings.get(id)?.when ?? -1);
    if (newer) ratings.set(id, theirs);
  }
}
function changed(given) { given.when = Math.max(Date.now(), (given.when ?? 0) + 1); }
function save() {
  if (!who()) return;
  try {
    merge(keptAt(keyOf(who())));
    localStorage.setItem(keyOf(who()), JSON.stringify({ ...state, ratings: Object.fromEntries(ratings) }));
    $("saved").textContent = data.words.saved;
  } catch {
    $("saved").textContent = data.words.unsaved;
  }
}
function rating() {
  const id = data.items[state.at].id;
  if (!ratings.has(id)) ratings.set(id, {});
  return ratings.get(id);
}
const complete = item => data.scales.every(name => Number.isInteger(ratings.get(item.id)?.[name]));
const said = id => Object.entries(ratings.get(id) ?? {}).filter(([name]) => name !== "when");
const rated = () => data.items.filter(item => said(item.id).length);

function mark() {
  const given = rating();
  fieldsets.forEach((set, index) => {
    set.classList.toggle("current", index === scale);
    set.classList.toggle("done", Number.isInteger(given[set.dataset.scale]));
    for (const input of set.querySelectorAll("input")) input.checked = String(given[set.dataset.scale]) === input.value;
  });
  const done = data.items.filter(complete).length;
  $("progress").textContent = done + " / " + data.items.length;
}
function show(at) {
  state.at = Math.max(0, Math.min(data.items.length - 1, at));
  const item = data.items[state.at];
  $("where").textContent = (state.at + 1) + " / " + data.items.length + " · " + item.task;
  for (const name of ["post", "question", "label", "explanation"]) $(name).textContent = item[name];
  const first = data.scales.findIndex(name => !Number.isInteger(rating()[name]));
  scale = first < 0 ? 0 : first;
  $("comment").value = rating().comment || "";
  mark();
}
function rate(value) {
  if (!who()) { $("rater").focus(); $("saved").textContent = data.words.name_first; return; }
  rating()[data.scales[scale]] = value;
  changed(rating());
  if (scale < data.scales.length - 1) scale += 1;
  save();
  mark();
}
function go(step) { show(state.at + step); save(); $("where").focus({ preventScroll: true }); window.scrollTo(0, 0); }
function unrated() {
  for (let step = 1; step <= data.items.length; step += 1) {
    const at = (state.at + step) % data.items.length;
    if (!complete(data.items[at])) { show(at); save(); return; }
  }
}
function download(name, type, text) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
function named(ending) {
  if (!who()) { $("rater").focus(); $("saved").textContent = data.words.name_first; return null; }
  return "ratings-" + data.form + "-" + who().replace(/[^\p{L}\p{N}_-]+/gu, "_") + ending;
}
function asJson() {
  const given = Object.fromEntries(rated().map(item => [item.id, Object.fromEntries(said(item.id))]));
  return JSON.stringify({ form: data.form, rater: who(), ratings: given }, null, 1);
}
function asCsv() {
  // What a spreadsheet would take for a formula (of a name also for a number or a date) is made text by a mark; so is
  // what begins with the mark itself: `review import` gives back what stood there.
  const formula = new RegExp(data.formula, "i"), value = new RegExp(data.formula + "|" + data.value, "i");
  const inner = new RegExp(data.inner, "g");
  const cell = (text, marked) =>
    '"' + (marked.test(text) ? "'" : "") + text.replace(inner, "$1'").replaceAll('"', '""') + '"';
  const rows = rated().map(item => {
    const given = ratings.get(item.id);
    return [...[data.form, who(), item.id].map(name => cell(name, value)),
      ...data.scales.map(name => '"' + (given[name] ?? "") + '"'), cell(String(given.comment ?? ""), formula)];
  });
  return "\ufeff" + [["form", "rater", "id", ...data.scales, "comment"], ...rows].map(row => row.join(",")).join("\r\n") + "\r\n";
}

$("rater").addEventListener("change", event => { if (event.target.value !== state.rater) enter(event.target.value); });
$("comment").addEventListener("input", event => { rating().comment = event.target.value; changed(rating()); save(); });
$("previous").addEventListener("click", () => go(-1));
$("next").addEventListener("click", () => go(1));
$("unrated").addEventListener("click", unrated);
$("json").addEventListener("click", () => { const name = named(".json"); if (name) download(name, "application/json", asJson()); });
$("csv").addEventListener("click", () => { const name = named(".csv"); if (name) download(name, "text/csv", asCsv()); });
fieldsets.forEach((set, index) => set.addEventListener("change", event => { scale = index; rate(Number(event.target.value)); }));
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target.tagName === "TEXTAREA" || event.target.id === "rater";
  if (event.key === "Enter" && event.target.id === "rater") { event.target.blur(); return; }
  if (event.key === "Escape" && typing) { event.target.blur(); return; }
  if (typing) return;
  const act = {
    ArrowLeft: () => go(-1), ArrowRight: () => go(1), Enter: () => go(1), u: unrated,
    ArrowUp: () => { scale = Math.max(0, scale - 1); mark(); },
    ArrowDown: () => { scale = Math.min(data.scales.length - 1, scale + 1); mark(); },
    c: () => $("comment").focus(), Backspace: () => { if (!who()) return; delete rating()[data.scales[scale]]; changed(rating()); save(); mark(); },
  }[event.key] || (/^[0-3]$/.test(event.key) ? () => rate(Number(event.key)) : null);
  if (!act || (event.key === "Enter" && event.target.tagName === "BUTTON")) return;
  event.preventDefault();
  // A key that is held down rates one scale, not all that follow, and passes one item.
  if (event.repeat && (event.key === "Enter" || /^[0-3]$/.test(event.key))) return;
  act();
});
window.addEventListener("storage", event => {
  if (!who() || event.key !== keyOf(who())) return;
  merge(keptAt(event.key));
  if (document.activeElement !== $("comment")) $("comment").value = rating().comment || "";
  mark();
});
adopt();
let before = "";
try { before = sessionStorage.getItem(base) ?? ""; } catch { /* asked anew */ }
$("rater").value = before;
enter(before);
if (!before) $("rater").focus();
