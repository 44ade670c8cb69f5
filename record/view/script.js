"use strict";
(() => {
const $ = id => document.getElementById(id), root = document.documentElement;
const D = JSON.parse($("data").textContent), before = D.lead.concat(D.text);
const text = $("text"), spans = [...text.children], N = spans.length;
const gain = D.nll.map((b, i) => b - D.mixed[i]), calm = matchMedia("(prefers-reduced-motion: reduce)");
const group = n => n.toLocaleString("en-US"), minus = s => s.replace("-", "\u2212");
let current = -1, hovered = -1, marked = [];

function make(tag, name, content) {
  const e = document.createElement(tag);
  if (name) e.className = name;
  if (content !== undefined) e.textContent = content;
  return e;
}
const name = i => D.text[i] || D.piece[i];
function shown(name) {              // newlines and tabs as signs, a lone accent on a circle
  return name.replace(/\n/g, "\u21b5").replace(/\t/g, "\u2192").replace(/^\p{M}/u, "\u25cc$&");
}
function word(name) {               // a leading space is a part of the token: show it
  const p = make("p", "word"), bare = name.replace(/^ +/, "");
  p.append(make("span", "space", "\u2423".repeat(name.length - bare.length)), shown(bare));
  return p;
}
function percent(bits) {
  const p = 100 * 2 ** -bits;
  if (p > 99.95) return "> 99.9 %";
  if (p >= 0.01) return p.toPrecision(p < 1 ? 2 : 3) + " %";
  return "1 in " + group(+(2 ** bits).toPrecision(2));
}
function verdict(i) {
  const g = gain[i], b = Math.abs(g).toFixed(2);
  return b === "0.00" ? "no difference" : (g > 0 ? "saved " : "lost ") + b + " bits";
}
function context(i) {               // the n - 1 tokens before token i, also those before the stretch
  const n = D.n[i] - 1, at = i + D.lead.length;
  const parts = before.slice(at - n, at);
  for (let k = n - 1; k >= 0 && !parts[k]; k--) parts[k] = D.piece[i - n + k] || "";  // bytes of a cut character
  return parts.join("");
}
function bar(list, label, kind, bits, scale, unit) {
  const track = make("dd", "track " + kind), fill = make(kind === "expected" ? "u" : "i");
  fill.style[kind === "expected" ? "left" : "width"] = 100 * bits / scale + "%";
  track.append(fill);
  const num = make("dd", "num", bits.toFixed(2));
  num.append(make("small", "", unit));
  list.append(make("dt", "", label), num, track);
}
function card(i) {
  const box = make("div"), bars = make("dl", "bars"), count = make("p", "count");
  box.append(word(name(i)), make("p", "verdict " + verdict(i).split(" ")[0], verdict(i)), bars, count);
  const scale = Math.max(12, D.nll[i], D.mixed[i]);
  bar(bars, "network", "model", D.nll[i], scale, "bits, " + percent(D.nll[i]));
  bar(bars, "mixture", "mixed" + (gain[i] < 0 ? " worse" : ""), D.mixed[i], scale, "bits, " + percent(D.mixed[i]));
  bar(bars, "expected", "expected", D.entropy[i], scale, "bits, entropy");
  if (D.n[i]) {
    const share = D.ngram_count[i] / D.context_count[i];
    count.append(make("q", "", shown(context(i)).trim() || "\u2423"), " seen ", make("b", "", group(D.context_count[i])),
      " \u00d7 before, followed by this token ", make("b", "", group(D.ngram_count[i])), " \u00d7 ("
      + (100 * share).toFixed(share > 0 && share < .1 ? 1 : 0) + " %); order " + D.n[i]);
  } else count.append("The tokens before it are new here: no context was known. The network decides, with learned weights also what this document has said.");
  const bytes = D.bytes[i] === 1 ? " byte" : " bytes", piece = D.piece[i] ? ", piece " + D.piece[i] : "";
  box.append(make("p", "meta", "target " + group(D.start + i) + ", " + D.bytes[i] + bytes + piece));
  $("card").replaceChildren(...box.children);
}
function show(i) {
  marked.forEach(e => e.classList.remove("ctx"));
  marked = i < 0 || !D.n[i] ? [] : spans.slice(Math.max(0, i - D.n[i] + 1), i);
  marked.forEach(e => e.classList.add("ctx"));
  if (i >= 0) card(i);
}
function select(i, how) {
  i = Math.max(0, Math.min(N - 1, i));
  if (current >= 0) {
    spans[current].classList.remove("on");
    spans[current].removeAttribute("aria-selected");
  }
  spans[current < 0 ? 0 : current].tabIndex = -1;
  current = i;
  const e = spans[i];
  e.tabIndex = 0;
  e.classList.add("on");
  e.setAttribute("aria-selected", "true");
  if (!e.hasAttribute("aria-label")) e.setAttribute("aria-label", shown(name(i)) + ": " + verdict(i));
  if (hovered >= 0) spans[hovered].classList.remove("hover");
  hovered = -1;
  if (how.focus) e.focus({preventScroll: true});
  const behavior = how.block === "center" && !calm.matches ? "smooth" : "auto";
  if (how.block) e.scrollIntoView({block: how.block, behavior});
  show(i);
  $("cursor").style.cssText = "visibility:visible;left:" + place((i + .5) / N);
  for (const b of document.querySelectorAll(".rank button"))
    +b.dataset.i === i ? b.setAttribute("aria-current", "true") : b.removeAttribute("aria-current");
  try { history.replaceState(null, "", "#t" + (D.start + i)); } catch { /* a page without an address */ }
}
function place(share) {
  const strip = $("overview"), svg = strip.firstElementChild.getBoundingClientRect();
  return svg.left - strip.getBoundingClientRect().left + share * svg.width + "px";
}

// pointer and focus
const index = e => { const s = e.target.closest("#text > span"); return s ? s.id.slice(1) - D.start : -1; };
text.addEventListener("pointerover", e => {
  const i = index(e);
  if (e.pointerType === "touch" || i === hovered) return;
  if (hovered >= 0) spans[hovered].classList.remove("hover");
  hovered = i;
  if (i >= 0) { spans[i].classList.add("hover"); show(i); }
});
text.addEventListener("pointerleave", () => {
  if (hovered >= 0) spans[hovered].classList.remove("hover");
  hovered = -1;
  if (current >= 0) show(current);
});
text.addEventListener("click", e => { const i = index(e); if (i >= 0) select(i, {focus: true}); });
text.addEventListener("focusin", e => { const i = index(e); if (i >= 0 && i !== current) select(i, {}); });

// ranks
const ranked = [...gain.keys()].sort((a, b) => gain[b] - gain[a] || a - b);
const ranks = {gains: ranked.filter(i => gain[i] > 0), losses: ranked.filter(i => gain[i] < 0).reverse()};
const turn = {gains: -1, losses: -1};
function jump(kind, step) {
  const list = ranks[kind], here = list.indexOf(current);
  if (!list.length) return;
  const from = here >= 0 ? here : turn[kind];
  turn[kind] = Math.max(0, Math.min(list.length - 1, from + step));
  select(list[turn[kind]], {focus: true, block: "center"});
  $("said").textContent = "Rank " + (turn[kind] + 1) + " of the " + kind;
}
for (const kind of ["gains", "losses"]) {
  for (const i of ranks[kind].slice(0, 8)) {
    const li = make("li"), b = make("button"), line = make("span");
    b.dataset.i = i;
    const bits = minus((gain[i] > 0 ? "+" : "") + gain[i].toFixed(1));
    b.append(make("em", kind === "gains" ? "saved" : "lost", bits), line);
    line.append(shown(D.text.slice(Math.max(0, i - 5), i).join("")).slice(-14), make("b", "", shown(name(i))),
      shown(D.text.slice(i + 1, i + 6).join("")));
    b.addEventListener("click", () => select(i, {focus: true, block: "center"}));
    li.append(b);
    $(kind).append(li);
  }
  if (!ranks[kind].length) $(kind).append(make("li", "hint", "none"));
}

// keys
function line(step) {               // the token of the next line nearest to this one's middle
  const box = spans[current].getClientRects()[0], middle = (box.left + box.right) / 2;
  let best = current, far = Infinity, top = null;
  for (let i = current + step; i >= 0 && i < N; i += step) {
    const r = spans[i].getClientRects()[0];
    if (!r || Math.abs(r.top - box.top) < box.height / 2) continue;
    if (top === null) top = r.top;
    if (Math.abs(r.top - top) > box.height / 2) break;
    const d = Math.abs((r.left + r.right) / 2 - middle);
    if (d < far) [best, far] = [i, d];
  }
  return best;
}
const keys = {
  ArrowRight: () => select(current + 1, {focus: true, block: "nearest"}),
  ArrowLeft: () => select(current < 0 ? 0 : current - 1, {focus: true, block: "nearest"}),
  ArrowDown: () => select(current < 0 ? 0 : line(1), {focus: true, block: "nearest"}),
  ArrowUp: () => select(current < 0 ? 0 : line(-1), {focus: true, block: "nearest"}),
  Home: () => select(0, {focus: true, block: "center"}), End: () => select(N - 1, {focus: true, block: "center"}),
  n: () => jump("gains", 1), p: () => jump("gains", -1), N: () => jump("losses", 1), P: () => jump("losses", -1),
  c: () => { $("mode").selectedIndex = ($("mode").selectedIndex + 1) % $("mode").length; colour(); },
  t: () => theme(1)};
addEventListener("keydown", e => {
  if (e.ctrlKey || e.metaKey || e.altKey || e.target.tagName === "SELECT" || !Object.hasOwn(keys, e.key)) return;
  if (e.key.length > 1 && e.target.tagName === "BUTTON") return;
  e.preventDefault();
  keys[e.key]();
});
$("next").addEventListener("click", () => jump("gains", 1));
$("nextloss").addEventListener("click", () => jump("losses", 1));

// colours
function colour() { document.body.dataset.mode = text.dataset.mode = $("mode").value; }
$("mode").addEventListener("change", colour);
const themes = ["system", "light", "dark"];
let chosen = "system";
try { chosen = localStorage.getItem("theme") || chosen; } catch { /* no storage: the system's theme */ }
function theme(step) {
  chosen = themes[(themes.indexOf(chosen) + step + 3) % 3] || "system";
  chosen === "system" ? delete root.dataset.theme : root.dataset.theme = chosen;
  $("theme").textContent = "Theme: " + chosen;
  try { localStorage.setItem("theme", chosen); } catch { /* as above */ }
}
$("theme").addEventListener("click", () => theme(1));
theme(0);

// the strip: where the window is, and a click to go there
function findTop(y) {
  let a = 0, b = N - 1;
  while (a < b) { const m = a + b >> 1; spans[m].getBoundingClientRect().bottom < y ? a = m + 1 : b = m; }
  return a;
}
function follow() {
  const top = findTop($("bar").getBoundingClientRect().bottom), end = findTop(innerHeight);
  $("window").style.left = place(top / N);
  $("window").style.width = parseFloat(place((end + 1) / N)) - parseFloat(place(top / N)) + "px";
  if (current >= 0) $("cursor").style.left = place((current + .5) / N);
}
let waiting = false;
function later() {
  if (!waiting) requestAnimationFrame(() => { waiting = false; follow(); });
  waiting = true;
}
addEventListener("scroll", later, {passive: true});
addEventListener("resize", later);
$("overview").addEventListener("pointerdown", e => go(e));
$("overview").addEventListener("pointermove", e => { if (e.buttons) go(e); });
function go(e) {
  const r = $("overview").firstElementChild.getBoundingClientRect(), share = (e.clientX - r.left) / r.width;
  spans[Math.max(0, Math.min(N - 1, Math.floor(share * N)))].scrollIntoView({block: "center"});
}
spans[0].tabIndex = 0;
follow();
const asked = /^#t(\d+)$/.exec(location.hash);
if (asked && spans[asked[1] - D.start]) select(asked[1] - D.start, {focus: true, block: "center"});
else if (ranks.gains.length && innerWidth > 900) {
  hovered = ranks.gains[0];
  spans[hovered].classList.add("hover");
  show(hovered);
}
})();
