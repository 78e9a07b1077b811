// The operators' page: asks for the state every two seconds and draws it. Texts come from the server and are put in as text.
"use strict";

const $ = id => document.getElementById(id);
const PAUSE = 2000, LATE = 8000;
const VIRIDIS = ["440154", "482878", "3e4a89", "31688e", "26828e", "1f9e89", "35b779", "6ece58", "b5de2b", "fde725"];
const CIVIDIS = ["00224e", "123570", "3b496c", "575d6d", "707173", "8a8678", "a59c74", "c3b369", "e1cc55", "fee838"];
const scales = {};
let at = null, hours = 24, show = "mean", mesh, drawn = "", mapOf = null, field = null, newest = null, typed = 0;
let heard = Date.now();

const clock = seconds => new Date(seconds * 1000).toLocaleString([], {dateStyle: "medium", timeStyle: "medium"});
const capital = text => text && text[0].toUpperCase() + text.slice(1);
const short = seconds => new Date(seconds * 1000).toLocaleTimeString([], {hour: "2-digit", minute: "2-digit"});

function element(name, parts = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(parts)) node[key] = value;
  node.append(...children);
  return node;
}

function drawing(name, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

async function get(address) {
  const answer = await fetch(address, {cache: "no-store", signal: AbortSignal.timeout(LATE)});
  if (answer.status === 401) location.reload();
  if (!answer.ok) throw new Error((await answer.json().catch(() => ({}))).error || answer.statusText);
  return answer.json();
}

function ago(seconds) {
  if (seconds < 90) return `${Math.max(0, Math.round(seconds))} s ago`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min ago`;
  return `${Math.round(seconds / 3600)} h ago`;
}

function drawState(state) {
  $("state").className = state.light;
  document.title = `${state.word} – ${state.title}`;
  $("title").textContent = state.title;
  $("word").textContent = state.word;
  const sentences = $("sentences");
  if (sentences.dataset.shown !== JSON.stringify(state.sentences)) {
    sentences.dataset.shown = JSON.stringify(state.sentences);
    sentences.replaceChildren(...state.sentences.map(text => element("li", {textContent: text})));
  }
  $("when").textContent = state.reading === null ? "" : `Reading of ${clock(state.reading.time)}`
    + (state.past ? "" : `, came ${ago(state.clock - state.reading.received)}`);
  $("past").hidden = !state.past;
  $("past").firstElementChild.textContent = at === null ? "" : `This is the past: ${clock(at)}.`;
  $("report").href = at === null ? "report" : `report?at=${at}`;
  $("foot").textContent = `Model ${state.model}. Every number is a statement of probability; numbers that are not to be `
    + "trusted are not shown.";
}

function drawAlarms(alarms) {
  const list = $("alarms").querySelector("ul"), text = JSON.stringify(alarms);
  $("alarms").hidden = !alarms.length;
  // A form in which somebody writes is left alone.
  if (list.dataset.shown === text || list.contains(document.activeElement) && Date.now() - typed < LATE) return;
  list.dataset.shown = text;
  list.replaceChildren(...alarms.map(alarm => {
    const on = alarm.ended === null;
    const words = element("div", {}, element("h3", {textContent: capital(alarm.title)}), element("p", {textContent: alarm.message}),
      element("p", {className: "soft", textContent: `Raised ${clock(alarm.raised)}, `
        + (on ? "still on" : `ended ${clock(alarm.ended)}`)
        + (alarm.by === null ? "" : `; acknowledged by ${alarm.by}, ${clock(alarm.acknowledged)}`)}));
    const item = element("li", {className: `${on ? "on" : alarm.by === null ? "ended" : "over"} ${alarm.level}`}, words);
    if (alarm.by === null && at === null) item.append(acknowledgement(alarm.id));
    return item;
  }));
}

function acknowledgement(number) {
  const name = element("input", {placeholder: "Your name", required: true, maxLength: 80, autocomplete: "name",
    ariaLabel: "Your name"});
  try { name.value = localStorage.getItem("name") || ""; } catch { /* private windows keep nothing */ }
  const form = element("form", {}, name, element("button", {textContent: "Acknowledge"}));
  form.addEventListener("input", () => { typed = Date.now(); });
  form.addEventListener("submit", async event => {
    event.preventDefault();
    try { localStorage.setItem("name", name.value); } catch { /* as above */ }
    const answer = await fetch(`api/alarms/${number}/acknowledge`, {method: "POST", body: JSON.stringify({name: name.value}),
      headers: {"Content-Type": "application/json"}}).catch(() => null);
    if (answer === null || !answer.ok) {
      const told = answer === null ? "The monitor does not answer." : (await answer.json()).error;
      form.append(element("span", {textContent: told, role: "alert"}));
    }
    typed = 0;
    refresh();
  });
  return form;
}

function drawQuantities(state) {
  const place = $("quantities");
  while (place.children.length > state.quantities.length) place.lastElementChild.remove();
  state.quantities.forEach((quantity, i) => {
    if (!place.children[i]) place.append(element("article", {className: "card"}, element("h3"),
      element("p", {className: "number"}), element("p", {className: "band"}), element("div", {className: "rules"})));
    const card = place.children[i], nothing = quantity.text === null;
    card.querySelector("h3").textContent = capital(quantity.name);
    card.querySelector(".number").textContent = nothing ? "No number" : quantity.text;
    card.querySelector(".number").classList.toggle("nothing", nothing);
    card.querySelector(".band").textContent = nothing ? "The reading is not to be trusted."
      : `With 90 % probability ${quantity.band}.`;
    card.querySelector(".rules").replaceChildren(...quantity.rules.map(rule => element("p", {
      className: rule.holds ? "holds" : "", textContent: `${capital(rule.text)}: probability `
        + `${rule.chance}${rule.holds ? " – rule holds" : ""}`})));
  });
}

// ---- Time lines

function ticks(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map(x => x * power).find(x => x >= raw);
  const found = [];
  for (let x = Math.ceil(low / step) * step; x <= high + step * 1e-9; x += step) found.push(Math.abs(x) < step / 1e6 ? 0 : x);
  return found;
}

// Whole minutes, hours or days of the clock on the wall.
function clockTicks(start, stop, count) {
  const step = [60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400, 172800, 604800].find(
    x => x * count >= stop - start) ?? 604800 * Math.ceil((stop - start) / count / 604800);
  const offset = new Date(start * 1000).getTimezoneOffset() * 60, found = [];
  for (let t = Math.ceil((start - offset) / step) * step + offset; t <= stop; t += step) found.push(t);
  return found;
}

const digits = x => Math.abs(x) >= 1e5 || (x && Math.abs(x) < 1e-3) ? x.toExponential(1) : String(Number(x.toPrecision(4)));

function runs(values) {
  const found = [];
  values.forEach((value, i) => {
    if (value === null) return;
    if (i && values[i - 1] !== null) found.at(-1).push(i); else found.push([i]);
  });
  return found;
}

// Median with bands over some places, by their numbers.
function drawBands(svg, run, x, row, y) {
  const along = (places, q) => places.map(i => `${x(i).toFixed(1)},${y(row(i)[q]).toFixed(1)}`).join(" ");
  const back = [...run].reverse();
  for (const [a, b, name] of [[0, 4, "most"], [1, 3, "half"]])
    svg.append(drawing("polygon", {points: `${along(run, a)} ${along(back, b)}`, class: name}));
  svg.append(drawing("polyline", {points: along(run, 2), class: "middle"}));
}

function drawLevels(svg, low, high, y, from, to) {
  for (const v of ticks(low, high, 4)) svg.append(drawing("line", {x1: from, x2: to, y1: y(v), y2: y(v), class: "axis"}),
    drawing("text", {x: from - 8, y: y(v) + 5, "text-anchor": "end"}, digits(v)));
}

function timeLine(times, rows, quantity, start, stop, W) {
  const [H, L, B, T, R] = [240, 78, 30, 12, 14];
  const svg = drawing("svg", {viewBox: `0 0 ${W} ${H}`, role: "img"});
  svg.append(drawing("title", {}, `${quantity.name} over time`), drawing("defs", {}, drawing("pattern", {id: "hatch",
    width: 8, height: 8, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)"},
    drawing("line", {y2: 8, class: "hatch"}))));
  const known = rows.filter(row => row !== null).flatMap(row => [row[0], row[4]]);
  if (known.length) known.push(...quantity.thresholds);
  let low = Math.min(...known, Infinity), high = Math.max(...known, -Infinity);
  if (!known.length) [low, high] = [0, 1];
  const room = 0.06 * (high - low) || Math.abs(high) * 0.1 || 1;
  [low, high] = [low - room, high + room];
  const x = t => L + (t - start) / (stop - start) * (W - L - R), y = v => T + (high - v) / (high - low) * (H - T - B);
  drawLevels(svg, low, high, y, L, W - R);
  for (const t of clockTicks(start, stop, W < 480 ? 3 : 6)) {
    const text = new Date(t * 1000).getHours() + new Date(t * 1000).getMinutes() ? short(t)
      : new Date(t * 1000).toLocaleDateString([], {month: "short", day: "numeric"});
    svg.append(drawing("text", {x: x(t), y: H - 8, "text-anchor": x(t) > W - R - 25 ? "end" : "middle"}, text));
  }
  svg.append(drawing("text", {x: 0, y: 0, transform: `translate(14 ${(T + H - B) / 2}) rotate(-90)`, "text-anchor": "middle"},
    quantity.unit || quantity.name.slice(0, 24)));
  times.forEach((t, i) => {
    if (rows[i] !== null) return;
    const from = x(i ? (times[i - 1] + t) / 2 : t), to = x(i + 1 < times.length ? (times[i + 1] + t) / 2 : t);
    svg.append(drawing("rect", {x: from, y: T, width: Math.max(2, to - from), height: H - T - B, class: "none"}));
  });
  for (const run of runs(rows)) {
    drawBands(svg, run, i => x(times[i]), i => rows[i], y);
    if (run.length === 1 || run.includes(rows.length - 1))
      svg.append(drawing("circle", {cx: x(times[run.at(-1)]), cy: y(rows[run.at(-1)][2]), r: 4, class: "dot"}));
  }
  if (known.length) for (const v of quantity.thresholds)
    svg.append(drawing("line", {x1: L, x2: W - R, y1: y(v), y2: y(v), class: "limit"}));
  if (at !== null && at >= start && at <= stop)
    svg.append(drawing("line", {x1: x(at), x2: x(at), y1: T, y2: H - B, class: "chosen"}));
  svg.addEventListener("click", event => {
    const box = svg.getBoundingClientRect(), place = (event.clientX - box.left) / box.width * W;
    const t = start + (place - L) / (W - L - R) * (stop - start);
    if (times.length) choose(times.reduce((a, b) => Math.abs(b - t) < Math.abs(a - t) ? b : a));
  });
  return svg;
}

async function drawLines(state) {
  const last = state.reading ? state.reading.time : null;
  if (!state.quantities.length) return;
  const width = Math.max(280, $("quantities").firstElementChild.clientWidth - 36);
  const wanted = JSON.stringify([last, hours, at, width, state.quantities.map(quantity => quantity.thresholds)]);
  if (last === null || drawn === wanted) return;
  newest = at === null ? last : Math.max(last, newest ?? last);
  const start = newest - hours * 3600;
  const series = await get(`api/series?from=${start}&to=${newest}`);
  // Where there is less than was asked for, what there is fills the picture.
  const first = Math.max(start, series.times.length ? series.times[0] : start);
  state.quantities.forEach((quantity, i) => {
    const card = $("quantities").children[i];
    card.querySelector("svg")?.remove();
    card.append(timeLine(series.times, series.lines[i], quantity, Math.min(first, newest - 60), newest, width));
  });
  drawn = wanted;
}

// ---- Map

function colour(share, stops) {
  const place = Math.min(Math.max(share, 0), 1) * (stops.length - 1), i = Math.min(Math.floor(place), stops.length - 2);
  const part = [0, 2, 4].map(k => {
    const [a, b] = [stops[i], stops[i + 1]].map(stop => parseInt(stop.slice(k, k + 2), 16));
    return Math.round(a + (b - a) * (place - i));
  });
  return `rgb(${part.join(" ")})`;
}

function geometry() {
  const xs = mesh.corners.filter((_, i) => i % 2 === 0), ys = mesh.corners.filter((_, i) => i % 2);
  const of = (f, values) => values.reduce((a, b) => f(a, b));
  const [x0, x1, y0, y1] = [of(Math.min, xs), of(Math.max, xs), of(Math.min, ys), of(Math.max, ys)];
  // The longer side fills the picture; a bar below tells lengths.
  const pad = 12, foot = 70, size = 1200 / Math.max(x1 - x0, y1 - y0);
  const W = Math.round((x1 - x0) * size + 2 * pad), H = Math.round((y1 - y0) * size + 2 * pad + foot);
  return {xs, ys, W, H, size, x: v => pad + (v - x0) * size, y: v => H - pad - foot - (v - y0) * size};
}

async function drawMap(state) {
  if (mesh === undefined) {
    mesh = await get("api/mesh");
    if (mesh?.axes.length === 2) mesh.view = geometry();
    if (mesh) $("slice").textContent = mesh.axes.length === 1 ? "Bands hold the value of a place with 50 and 90 % "
      + "probability; the line is the median, circles are sensors." : mesh.slice && `The map is a slice ${mesh.slice}: `
      + "sensors above and below it are shown, too.";
  }
  $("map").hidden = mesh === null;
  if (mesh === null) return;
  $("nothing").textContent = state.map === null ? nothing(state) : "";
  if (mesh.axes.length === 1) return drawAlong(state);
  const wanted = `${state.map} ${show}`;
  drawMarks(state.sensors);
  if (mapOf === wanted) return;
  const canvas = $("canvas"), {W, H, xs, ys, x, y} = mesh.view, pen = canvas.getContext("2d");
  const what = show === "mean" ? "mean" : "standard deviation";
  $("map").querySelector("h2").textContent = `${capital(mesh.name)}, ${what}`;
  [canvas.width, canvas.height] = [W, H];
  canvas.ariaLabel = `Map of the ${mesh.name}, ${what}`;
  if (state.map === null) {
    field = null;
    // Where there is something is shown all the same, for the sensors.
    pen.fillStyle = pen.strokeStyle = getComputedStyle($("map")).getPropertyValue("--rule");
    for (let i = 0; i < mesh.cells.length; i += 3) {
      pen.beginPath();
      for (const c of [0, 1, 2].map(k => mesh.cells[i + k])) pen.lineTo(x(xs[c]), y(ys[c]));
      pen.closePath();
      pen.fill();
      pen.stroke();
    }
    $("scale").hidden = true;
    mapOf = wanted;
    return;
  }
  field = await get(`api/map?reading=${state.map}`);
  const values = field[show], stops = show === "mean" ? VIRIDIS : CIVIDIS;
  const scale = scales[show] ||= [Infinity, -Infinity];
  // The scale only grows, so that equal colours of two maps are equal values.
  for (const value of values) { scale[0] = Math.min(scale[0], value); scale[1] = Math.max(scale[1], value); }
  const width = scale[1] - scale[0] || 1, t = mesh.cells;
  // Few triangles are drawn in parts, so that colours run smoothly.
  const deep = t.length < 1500 ? 3 : t.length < 24000 ? 1 : 0;
  pen.lineWidth = 1;
  const fill = (a, b, c, level) => {
    if (level) {
      const half = (p, q) => p.map((value, k) => (value + q[k]) / 2), [ab, bc, ca] = [half(a, b), half(b, c), half(c, a)];
      for (const part of [[a, ab, ca], [ab, b, bc], [ca, bc, c], [ab, bc, ca]]) fill(...part, level - 1);
      return;
    }
    pen.fillStyle = pen.strokeStyle = colour(((a[2] + b[2] + c[2]) / 3 - scale[0]) / width, stops);
    pen.beginPath();
    pen.moveTo(a[0], a[1]);
    pen.lineTo(b[0], b[1]);
    pen.lineTo(c[0], c[1]);
    pen.closePath();
    pen.fill();
    pen.stroke();
  };
  for (let i = 0; i < t.length; i += 3)
    fill(...[t[i], t[i + 1], t[i + 2]].map(c => [x(xs[c]), y(ys[c]), values[c]]), deep);
  const bar = $("scale").querySelector("canvas").getContext("2d");
  for (let i = 0; i < 256; i++) {
    bar.fillStyle = colour(i / 255, stops);
    bar.fillRect(i, 0, 1, 1);
  }
  const [from, middle, to] = $("scale").querySelectorAll("span");
  from.textContent = digits(Number(scale[0].toPrecision(3)));
  middle.textContent = `${mesh.name}, ${what}${mesh.unit ? ` [${mesh.unit}]` : ""}`;
  to.textContent = digits(Number(scale[1].toPrecision(3)));
  $("scale").hidden = false;
  mapOf = wanted;
}

// Bands along a line, in place of a map.
async function drawAlong(state) {
  const width = Math.max(280, $("map").clientWidth), wanted = JSON.stringify([state.map, width, state.sensors]);
  if (mapOf === wanted) return;
  const title = capital(mesh.name), [H, L, B, T, R] = [360, 78, 74, 12, 20];
  $("map").querySelector("h2").textContent = title;
  for (const part of $("map").querySelectorAll(".choice, .frame, #scale")) part.hidden = true;
  const svg = drawing("svg", {viewBox: `0 0 ${width} ${H}`, role: "img"}), places = mesh.corners;
  svg.append(drawing("title", {}, `${title} by place`));
  const [start, stop] = [Math.min(...places), Math.max(...places)];
  const x = v => L + (v - start) / (stop - start) * (width - L - R);
  field = state.map === null ? null : await get(`api/map?reading=${state.map}`);
  if (field) {
    const scale = scales.bands ||= [Infinity, -Infinity];
    for (const value of field.bands[0]) scale[0] = Math.min(scale[0], value);
    for (const value of field.bands[4]) scale[1] = Math.max(scale[1], value);
    const room = 0.06 * (scale[1] - scale[0]) || 1, [low, high] = [scale[0] - room, scale[1] + room];
    const y = v => T + (high - v) / (high - low) * (H - T - B), pieces = [];
    drawLevels(svg, low, high, y, L, width - R);
    // Where pieces meet they are one, so that no seam is seen.
    for (let i = 0; i < places.length; i += 2)
      if (i && places[i] === places[i - 1]) pieces.at(-1).push(i, i + 1); else pieces.push([i, i + 1]);
    for (const piece of pieces) drawBands(svg, piece, i => x(places[i]), i => field.bands.map(row => row[i]), y);
  }
  for (const v of ticks(start, stop, width < 480 ? 3 : 6))
    svg.append(drawing("text", {x: x(v), y: H - 30, "text-anchor": "middle"}, digits(v)));
  svg.append(drawing("text", {x: (L + width - R) / 2, y: H - 8, "text-anchor": "middle"},
    mesh.axes[0] + (mesh.length && ` [${mesh.length}]`)), drawing("text", {"text-anchor": "middle",
    transform: `translate(14 ${(T + H - B) / 2}) rotate(-90)`}, mesh.unit || mesh.name.slice(0, 24)));
  state.sensors.forEach((sensor, i) => {
    if (sensor.point) svg.append(drawing("g", {class: `mark ${look(sensor)}`}, drawing("circle", {cx: x(sensor.point[0]),
      cy: H - B + 10, r: 7, "stroke-width": 3}), drawing("text", {x: x(sensor.point[0]) + 10, y: H - B + 15}, String(i + 1))));
  });
  $("bands").replaceChildren(svg);
  mapOf = wanted;
}

const nothing = state => state.reading === null ? "No reading has come." : state.quantities.some(part => part.text)
  ? "This reading was judged by another model, so nothing can be shown." : "Nothing is shown: the reading is not to be trusted.";

function drawMarks(sensors) {
  const {W, H, x, y, size} = mesh.view, svg = $("marks");
  svg.setAttribute("viewBox", `0 0 ${W} ${H}`);
  svg.parentElement.style.width = `min(100%, ${Math.round(75 * W / H)}vh)`;
  const big = Math.max(1, W / Math.max(svg.clientWidth, 300) * 0.8), long = ticks(0, 0.3 * W / size, 2)[1];
  const bar = drawing("g", {}, drawing("path", {d: `M12 ${H - 50}v${12 * big}h${long * size}v${-12 * big}`,
    "stroke-width": 2 * big}), drawing("text", {x: 24 + long * size, y: H - 50 + 14 * big}, `${digits(long)} ${mesh.length}`));
  svg.replaceChildren(bar, ...sensors.flatMap((sensor, i) => {
    if (!sensor.point) return [];
    const [a, b] = [x(sensor.point[0]), y(sensor.point[1])];
    return [drawing("g", {class: `mark ${look(sensor)}`}, drawing("circle", {cx: a, cy: b, r: 8 * big, "stroke-width": 3 * big}),
      drawing("text", {x: a + 12 * big, y: b + 6 * big}, String(i + 1)))];
  }));
  svg.querySelectorAll("text").forEach(text => { text.style.fontSize = `${18 * big}px`; });
}

const look = sensor => ({"as expected": "", "reports nothing": "failed"})[sensor.look] ?? "unlike";

function drawSensors(sensors) {
  const text = JSON.stringify(sensors), body = $("sensors");
  if (body.dataset.shown === text) return;
  body.dataset.shown = text;
  body.replaceChildren(...sensors.map((sensor, i) => element("tr", {className: look(sensor)},
    element("td", {textContent: i + 1}), element("td", {textContent: sensor.name}),
    element("td", {textContent: sensor.text, className: "figure"}),
    element("td", {textContent: sensor.off, className: "figure"}), element("td", {textContent: sensor.look}))));
}

function drawProblems(problems) {
  $("problems").hidden = !problems.length;
  $("problems").querySelector("ul").replaceChildren(...problems.map(problem =>
    element("li", {textContent: `${clock(problem.time)}: ${problem.text}`})));
}

// ---- The loop

function lost(text) {
  $("lost").textContent = text;
  $("lost").hidden = !text;
  if (text) {
    $("state").className = "grey";
    $("word").textContent = "No connection";
  }
}

let running = null;
async function refresh() {
  // One at a time; who asks meanwhile gets another one after it.
  if (running) return running.then(refresh);
  running = (async () => {
    try {
      const state = await get(`api/state${at === null ? "" : `?at=${at}`}`);
      heard = Date.now();
      drawState(state);
      lost("");
      drawAlarms(state.alarms);
      drawQuantities(state);
      drawSensors(state.sensors);
      drawProblems(state.problems);
      await drawLines(state);
      await drawMap(state);
    } catch (error) {
      if (Date.now() - heard > LATE / 2) lost(`The monitor does not answer since ${clock(heard / 1000)}. What is shown is old.`);
    }
  })();
  await running;
  running = null;
}

function choose(when) {
  at = when;
  drawn = "";
  refresh();
}

function pressed(group, button) {
  for (const other of group.querySelectorAll("button")) other.setAttribute("aria-pressed", String(other === button));
}

$("now").addEventListener("click", () => choose(null));
$("range").addEventListener("click", event => {
  if (!event.target.dataset.hours) return;
  hours = Number(event.target.dataset.hours);
  pressed($("range"), event.target);
  refresh();
});
$("map").querySelector(".choice").addEventListener("click", event => {
  if (!event.target.dataset.show) return;
  show = event.target.dataset.show;
  pressed(event.currentTarget, event.target);
  refresh();
});
$("jump").addEventListener("submit", event => {
  event.preventDefault();
  const when = new Date(event.target.querySelector("input").value).getTime() / 1000;
  if (Number.isFinite(when)) choose(Math.max(0, when));
});
$("canvas").addEventListener("pointermove", event => {
  if (!field || !mesh) return;
  const {W, H, xs, ys, x, y} = mesh.view, box = event.target.getBoundingClientRect();
  const [a, b] = [(event.clientX - box.left) / box.width * W, (event.clientY - box.top) / box.height * H];
  let best = 0, near = Infinity;
  xs.forEach((_, i) => {
    const away = (x(xs[i]) - a) ** 2 + (y(ys[i]) - b) ** 2;
    if (away < near) [best, near] = [i, away];
  });
  $("here").textContent = `Near (${digits(xs[best])}, ${digits(ys[best])})${mesh.length ? ` ${mesh.length}` : ""}: `
    + `${digits(Number(field.mean[best].toPrecision(3)))} ± ${digits(Number(field.std[best].toPrecision(2)))} ${mesh.unit}`;
});

(async function loop() {
  await refresh();
  setTimeout(loop, PAUSE);
})();
