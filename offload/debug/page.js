
"use strict";
// Draws the report from the JSON in #data. Text is only ever set as text, so nothing in the data can become markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byNumber = new Map(data.stalls.map(stall => [stall.n, stall]));
  const sources = new Map(data.offenders.flatMap(offender => offender.stalls.map(n => [n, offender.source])));
  const loops = withUnseenLoops();
  const LANES = 12, OFFENDERS = 6, ROWS = 20;
  const state = { cause: null, view: [0, span()], selected: null, lanes: LANES, offenders: OFFENDERS, rows: ROWS, sort: "n", down: false };

  // ---- small tools ----
  function $(id) { return document.getElementById(id); }
  function build(node, attributes, children) {
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value === null || value === undefined || value === false) continue;
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (name === "style") for (const [key, v] of Object.entries(value)) node.style.setProperty(key, v);
      else node.setAttribute(name, value === true ? "" : value);
    }
    node.append(...children.flat(Infinity).filter(child => child !== null && child !== undefined && child !== false && child !== ""));
    return node;
  }
  function h(tag, attributes, ...children) { return build(document.createElement(tag), attributes, children); }
  function s(tag, attributes, ...children) { return build(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children); }
  function sum(values) { return values.reduce((a, b) => a + b, 0); }
  function count(n, noun) { return n.toLocaleString("en") + " " + noun + (n === 1 ? "" : "s"); }
  function percent(share) { return share > 0 && share < 0.01 ? "<1 %" : Math.round(share * 100) + " %"; }
  function time(value) {
    if (value < 0.9995e-3) return (value * 1e6).toFixed(0) + " µs";
    if (value < 0.9995) return (value * 1000).toFixed(value < 0.00995 ? 1 : 0) + " ms";
    if (value < 99.95) return value.toFixed(value < 9.995 ? 2 : 1) + " s";
    const minutes = Math.floor(Math.round(value) / 60);
    return minutes < 60 ? minutes + " min " + Math.round(value) % 60 + " s" : Math.floor(minutes / 60) + " h " + minutes % 60 + " min";
  }
  function clock(value, step) {
    const digits = step < 0.001 ? 4 : step < 0.01 ? 3 : step < 0.1 ? 2 : step < 1 ? 1 : 0;
    if (data.duration < 120) return value.toFixed(digits) + " s";
    const all = digits ? value : Math.round(value), hours = Math.floor(all / 3600), minutes = Math.floor(all / 60) % 60;
    const seconds = (all % 60).toFixed(digits).padStart(digits ? digits + 3 : 2, "0");
    return (hours ? hours + ":" + String(minutes).padStart(2, "0") : minutes) + ":" + seconds;
  }
  function span() { return Math.max(data.duration, ...data.stalls.map(stall => stall.at + stall.for), 1e-6); }
  function title(cause) { return data.causes[cause][0]; }
  function frame(index) { const [file, line, name, source] = data.frames[index]; return { file, line, name, source }; }
  function dot(cause) { return h("i", { class: "dot c-" + cause, "aria-hidden": "true" }); }
  function verdict(value) { return h("span", { class: "verdict v-" + value }, { pass: "Pass", fail: "Fail", unmeasured: "Unmeasured" }[value]); }
  // `x` is shown as code
  function prose(text) { return text.split("`").map((part, index) => index % 2 ? h("code", {}, part) : part); }
  function say(text) { $("live").textContent = text; }
  function shown() { return state.cause ? data.stalls.filter(stall => stall.cause === state.cause) : data.stalls; }
  function sentence(stall) { return "Stall " + stall.n + ", " + time(stall.for) + ", " + stall.why + ", " + stall.where; }
  function more(button, hidden, act) {
    button.hidden = hidden <= 0;
    button.textContent = "Show " + hidden.toLocaleString("en") + " more";
    button.onclick = act;
  }
  function withUnseenLoops() {
    const known = new Set(data.loops.map(loop => loop.name)), all = [...data.loops];
    for (const stall of data.stalls) {
      if (known.has(stall.loop)) continue;
      known.add(stall.loop);
      all.push({ name: stall.loop, thread: "", iterations: 0, busy: 0, watched: 0, longest: 0, histogram: [], timeline: [], precision: stall.precision });
    }
    const cost = name => sum(data.stalls.filter(stall => stall.loop === name).map(stall => stall.for));
    const costs = new Map(all.map(loop => [loop.name, cost(loop.name)]));
    return all.sort((a, b) => costs.get(b.name) - costs.get(a.name) || b.busy - a.busy);
  }

  // ---- header ----
  function drawHeader() {
    const began = new Date(data.began * 1000);
    $("facts").append(
      verdict(data.verdict),
      h("time", { datetime: began.toISOString() }, began.toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" })),
      h("span", {}, "watched for " + time(data.duration)), h("span", {}, "limit " + time(data.threshold)),
      h("span", {}, "Python " + data.python), h("span", {}, data.platform));
    const blocked = sum(data.stalls.map(stall => stall.for));
    const longest = data.stalls.reduce((a, b) => !a || b.for > a.for ? b : a, null);
    const busiest = data.loops.filter(loop => loop.watched).map(loop => [loop.busy / loop.watched, loop.name]).sort((a, b) => b[0] - a[0])[0];
    const tile = (name, value, note) => h("div", {}, h("dt", {}, name), h("dd", {}, value, note && h("small", {}, note)));
    $("tiles").append(
      tile("Stalls", data.stalls.length.toLocaleString("en"), data.lost ? data.lost.toLocaleString("en") + " more not kept" : count(data.offenders.length, "offender")),
      tile("Time blocked", data.stalls.length ? time(blocked) : "none", data.stalls.length ? percent(blocked / data.duration) + " of the session" + (new Set(data.stalls.map(stall => stall.loop)).size > 1 ? ", loops added up" : "") : null),
      tile("Longest", longest ? time(longest.for) : "none", longest ? longest.where : null),
      tile("Busiest loop", busiest ? percent(busiest[0]) : "–", busiest ? busiest[1] + ", of " + count(data.loops.length, "loop") : "no loop was watched"));
    $("foot").textContent = "Made by offload. " + (loops.some(loop => loop.precision !== "exact")
      ? "Loops marked “heartbeat” cannot be timed exactly: their durations are good to a quarter of the limit."
      : "Durations are exact: every turn of each loop was timed.");
  }
  function drawEmpty() {
    $("empty").hidden = false;
    $("empty").append(
      s("svg", { width: 48, height: 48, viewBox: "0 0 48 48", "aria-hidden": "true" },
        s("circle", { cx: 24, cy: 24, r: 22, fill: "none", stroke: "currentColor", "stroke-width": 2.5 }),
        s("path", { d: "M15 24.5l6.2 6.2L33.5 18", fill: "none", stroke: "currentColor", "stroke-width": 3, "stroke-linecap": "round", "stroke-linejoin": "round" })),
      h("h2", {}, "Nothing blocked a loop"),
      h("p", {}, data.loops.length
        ? "All turns of " + count(data.loops.length, "loop") + " stayed below the limit of " + time(data.threshold) + "."
        : "No loop was watched: did the program run one?"));
  }

  // ---- causes ----
  function drawCauses() {
    const groups = new Map();
    for (const stall of data.stalls) {
      const group = groups.get(stall.cause) || { seconds: 0, count: 0 };
      group.seconds += stall.for; group.count += 1;
      groups.set(stall.cause, group);
    }
    const sorted = [...groups].sort((a, b) => b[1].seconds - a[1].seconds), all = sum(sorted.map(([, group]) => group.seconds));
    $("causes-bar").replaceChildren(...sorted.map(([cause, group]) =>
      h("i", { class: "c-" + cause + (state.cause && state.cause !== cause ? " dim" : ""), style: { flex: group.seconds + " 1 0" } })));
    $("causes-list").replaceChildren(...sorted.map(([cause, group]) => h("li", {}, h("button", {
      type: "button", class: "c-" + cause, "data-cause": cause, "aria-pressed": String(state.cause === cause),
      onclick: () => choose(state.cause === cause ? null : cause),
    }, dot(cause), h("strong", {}, title(cause)), h("span", {}, time(group.seconds)),
      h("small", {}, count(group.count, "stall") + ", " + percent(group.seconds / all) + ": " + data.causes[cause][1])))));
    $("all").hidden = !state.cause;
  }
  function choose(cause) {
    const focus = document.activeElement && document.activeElement.dataset.cause;
    state.cause = cause;
    drawFiltered();
    if (focus) document.querySelector('#causes-list [data-cause="' + focus + '"]').focus();
    say(cause ? "Showing " + title(cause) + " only" : "Showing all causes");
  }

  // ---- timeline ----
  const H = 76, GROUND = 44, TALL = 36, BUSY = 22;
  let lanes = [];
  function drawLanes() {
    const axis = s("svg", { height: 34, "aria-hidden": "true" });
    lanes = loops.slice(0, state.lanes).map(loop => {
      const stalls = data.stalls.filter(stall => stall.loop === loop.name).sort((a, b) => a.at - b.at);
      const svg = s("svg", {
        role: "group", tabindex: 0, "data-loop": loop.name,
        "aria-label": "Timeline of loop " + loop.name + ": " + count(stalls.length, "stall") + ". Arrow keys go from stall to stall.",
      });
      const lane = { loop, stalls, svg };
      follow(lane);
      return lane;
    });
    $("lanes").replaceChildren(
      h("div", { class: "axis" }, h("span", {}, "Loop"), axis),
      ...lanes.map(({ loop, stalls, svg }) => h("div", { class: "lane" },
        h("div", { class: "lane-name" }, h("strong", { title: loop.name }, loop.name),
          h("small", {}, count(stalls.length, "stall") + (loop.watched ? " · " + percent(loop.busy / loop.watched) + " busy" : ""))), svg)));
    more($("more-lanes"), loops.length - state.lanes, () => { state.lanes = Infinity; drawLanes(); });
    lanes.axis = axis;
    drawView();
  }
  function width() { return Math.max(60, (lanes[0] ? lanes[0].svg : $("lanes")).clientWidth || 300); }
  function x(at, w) { return (at - state.view[0]) / (state.view[1] - state.view[0]) * w; }
  function ticks(w) {
    const length = state.view[1] - state.view[0], rough = length / Math.max(2, Math.floor(w / 96));
    const power = 10 ** Math.floor(Math.log10(rough));
    const steps = rough > 20 ? [30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200, 86400] : [1, 2, 5, 10].map(n => n * power);
    const step = steps.find(n => n >= rough) || rough, found = [];
    for (let n = Math.ceil(state.view[0] / step - 1e-9); n * step <= state.view[1] + step * 1e-6; n++) found.push(n * step);
    return [found, step];
  }
  function drawView() {
    const w = width(), [marks, step] = ticks(w), whole = span();
    lanes.axis.setAttribute("viewBox", "0 0 " + w + " 34");
    lanes.axis.replaceChildren(...marks.flatMap(at => {
      const left = x(at, w), anchor = left < 24 ? "start" : left > w - 30 ? "end" : "middle";
      return [s("line", { class: "grid", x1: left, x2: left, y1: 28, y2: 34 }), s("text", { x: left, y: 20, "text-anchor": anchor }, clock(at, step))];
    }));
    const longest = Math.max(...data.stalls.map(stall => stall.for), data.threshold * 2);
    for (const lane of lanes) drawLane(lane, w, marks, longest);
    const all = state.view[0] <= 0 && state.view[1] >= whole;
    $("zoom-out").disabled = $("zoom-all").disabled = all;
  }
  function drawLane(lane, w, marks, longest) {
    const [from, to] = state.view, parts = [];
    for (const at of marks) parts.push(s("line", { class: "grid", x1: x(at, w), x2: x(at, w), y1: 0, y2: H }));
    let path = "", previous = null;
    const points = lane.loop.timeline;
    const usual = points.length > 1 ? points[1][0] - points[0][0] : data.duration;
    for (const [end, share] of points) {
      const start = previous === null ? Math.max(0, end - usual) : previous;
      previous = end;
      if (end < from || start > to) continue;
      const left = x(start, w).toFixed(1), right = x(end, w).toFixed(1), top = (H - 2 - share * BUSY).toFixed(1);
      path += "M" + left + " " + (H - 2) + "V" + top + "H" + right + "V" + (H - 2) + "Z";
    }
    parts.push(s("rect", { class: "band", x: 0, y: H - 2 - BUSY, width: w, height: BUSY }), s("path", { class: "busy", d: path }), s("line", { class: "ground", x1: 0, x2: w, y1: GROUND + .5, y2: GROUND + .5 }));
    lane.boxes = [];
    for (const stall of lane.stalls) {
      if (stall.at + stall.for < from || stall.at > to) continue;
      const left = x(stall.at, w), wide = Math.max(3, x(stall.at + stall.for, w) - left);
      const tall = 9 + (TALL - 9) * Math.max(0, Math.min(1, Math.log(stall.for / data.threshold) / Math.log(longest / data.threshold)));
      const dim = state.cause && stall.cause !== state.cause;
      parts.push(s("rect", {
        class: "stall c-" + stall.cause + " " + stall.verdict + (dim ? " dim" : "") + (state.selected === stall.n ? " on" : ""),
        x: left.toFixed(1), y: (GROUND - tall).toFixed(1), width: wide.toFixed(1), height: tall.toFixed(1), rx: 1.5, "data-stall": stall.n,
      }));
      if (!dim) lane.boxes.push([left, left + wide, stall]);
    }
    lane.overlay = s("g", { "pointer-events": "none" });
    parts.push(lane.overlay);
    lane.svg.setAttribute("viewBox", "0 0 " + w + " " + H);
    lane.svg.replaceChildren(...parts);
  }
  function nearest(lane, at) {  // the longest stall within a finger's or a pointer's reach
    const reach = matchMedia("(pointer: coarse)").matches ? 12 : 4;
    const near = lane.boxes.filter(([left, right]) => at >= left - reach && at <= right + reach);
    return near.reduce((a, b) => !a || b[2].for > a.for ? b[2] : a, null);
  }
  function zoom(from, to) {
    const whole = span(), length = Math.min(whole, Math.max(to - from, whole * 1e-5, 1e-3));
    const start = Math.max(0, Math.min((from + to) / 2 - length / 2, whole - length));
    state.view = [start, start + length];
    hideTip();
    drawView();
  }
  function zoomBy(factor, about) {
    const [from, to] = state.view, middle = about === undefined ? (from + to) / 2 : about;
    zoom(middle - (middle - from) * factor, middle + (to - middle) * factor);
  }
  function follow(lane) {  // pointer and keys
    const { svg } = lane;
    let began = null;
    const position = event => { const box = svg.getBoundingClientRect(); return Math.max(0, Math.min(box.width, event.clientX - box.left)); };
    const moment = at => state.view[0] + at / width() * (state.view[1] - state.view[0]);
    svg.addEventListener("pointerdown", event => { if (event.button === 0) { began = position(event); svg.setPointerCapture(event.pointerId); } });
    svg.addEventListener("pointermove", event => {
      const at = position(event);
      if (began !== null && Math.abs(at - began) > 5) {
        lane.overlay.replaceChildren(s("rect", { class: "chosen", x: Math.min(at, began), y: 0, width: Math.abs(at - began), height: H }));
        hideTip();
        return;
      }
      lane.overlay.replaceChildren(s("line", { class: "cross", x1: at, x2: at, y1: 0, y2: H }));
      const stall = nearest(lane, at);
      showTip(event.clientX, event.clientY, stall ? about(stall) : share(lane, moment(at)));
    });
    svg.addEventListener("pointerup", event => {
      if (began === null) return;
      const at = position(event), from = began;
      began = null;
      if (Math.abs(at - from) > 5) { zoom(moment(Math.min(at, from)), moment(Math.max(at, from))); return; }
      const stall = nearest(lane, at);
      if (stall) { hideTip(); open(stall.n); }
    });
    svg.addEventListener("pointercancel", () => { began = null; lane.overlay.replaceChildren(); hideTip(); });
    svg.addEventListener("pointerleave", () => { if (began === null) { lane.overlay.replaceChildren(); hideTip(); } });
    svg.addEventListener("wheel", event => {  // a pinch on a touch pad is a wheel with ctrl
      if (!event.ctrlKey && !event.metaKey) return;
      event.preventDefault();
      zoomBy(Math.exp(event.deltaY / 200), moment(position(event)));
    }, { passive: false });
    svg.addEventListener("keydown", event => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const list = lane.stalls.filter(stall => !state.cause || stall.cause === state.cause);
      const index = list.findIndex(stall => stall.n === state.selected);
      const about = index < 0 ? undefined : list[index].at;
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (step && list.length) select(lane, list[index < 0 ? (step > 0 ? 0 : list.length - 1) : Math.max(0, Math.min(list.length - 1, index + step))]);
      else if (event.key === "Enter" && index >= 0) open(state.selected);
      else if (event.key === "+" || event.key === "=") zoomBy(0.5, about);
      else if (event.key === "-") zoomBy(2, about);
      else if (event.key === "0") zoom(0, span());
      else return;
      event.preventDefault();
    });
  }
  function select(lane, stall) {
    state.selected = stall.n;
    const [from, to] = state.view;
    if (stall.at < from || stall.at > to) zoom(stall.at - (to - from) / 2, stall.at + (to - from) / 2);
    else drawView();
    say(sentence(stall));
  }
  function about(stall) {
    return [h("b", {}, dot(stall.cause), time(stall.for) + " · " + title(stall.cause)), h("span", { class: "mono" }, stall.where), h("span", {}, stall.why + " · at " + clock(stall.at, 0.1))];
  }
  function share(lane, at) {
    const point = lane.loop.timeline.find(([end]) => end >= at);
    return [h("span", {}, clock(at, 0.1) + (point ? " · " + percent(point[1]) + " busy" : ""))];
  }
  function showTip(left, top, children) {
    const tip = $("tip");
    tip.replaceChildren(...children);
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    tip.style.left = Math.max(12, Math.min(left + 14, innerWidth - box.width - 12)) + "px";
    tip.style.top = (top + 18 + box.height > innerHeight ? top - box.height - 14 : top + 18) + "px";
  }
  function hideTip() { $("tip").hidden = true; }

  // ---- offenders ----
  function drawOffenders() {
    const found = data.offenders.filter(offender => !state.cause || byNumber.get(offender.worst).cause === state.cause);
    const all = sum(data.stalls.map(stall => stall.for)) || 1;
    $("offenders-count").textContent = state.cause ? count(found.length, "offender") + " of " + data.offenders.length : data.offenders.some(offender => offender.verdict !== "fail") ? "failures first, by time" : "by time";
    $("offenders-list").replaceChildren(...found.slice(0, state.offenders).map(offender => offence(offender, all)));
    more($("more-offenders"), found.length - state.offenders, () => { state.offenders += 100; drawOffenders(); });
  }
  function offence(offender, all) {
    const stall = byNumber.get(offender.worst), blamed = stall.frame === undefined ? null : frame(stall.frame);
    const many = offender.stalls.length;
    return h("li", { class: "c-" + stall.cause },
      h("div", { class: "offence" },
        h("div", {},
          h("h3", {}, blamed ? blamed.name : stall.where),
          blamed && h("p", { class: "place mono" }, blamed.file + ":" + blamed.line),
          h("p", { class: "tags" }, h("span", { class: "tag" }, dot(stall.cause), title(stall.cause)), h("span", {}, stall.why), h("span", {}, "loop " + stall.loop),
            offender.verdict !== "fail" && verdict(offender.verdict))),
        h("div", { class: "cost" }, h("strong", {}, time(offender.total)),
          h("small", {}, many === 1 ? "once" : many.toLocaleString("en") + " times"),
          many > 1 && h("small", {}, "p50 " + time(offender.p50) + " · p99 " + time(offender.p99) + " · max " + time(stall.for))),
        h("div", { class: "share", role: "img", "aria-label": percent(offender.total / all) + " of all stalled time" },
          h("i", { style: { width: (offender.total / all * 100).toFixed(2) + "%" } }))),
      code(offender.source, stall),
      stall.kind === "saturated" && contributors(stall),
      stall.advice && h("p", { class: "fix" }, h("strong", {}, "Fix: "), prose(stall.advice)),
      h("div", { class: "foot" }, h("div", { class: "moments" }, moments(offender), h("span", {}, firstAndLast(offender))),
        h("button", { type: "button", class: "quiet", "data-open": stall.n, onclick: () => open(stall.n) }, many === 1 ? "Details" : "Details of the longest")));
  }
  function code(lines, stall) {
    if (!lines.length) return null;
    const line = frame(stall.frame).line, margin = Math.min(...lines.filter(([, text]) => text).map(([, text]) => text.length - text.trimStart().length));
    return h("div", { class: "code", tabindex: 0, role: "group", "aria-label": "Source around line " + line },
      ...lines.map(([number, text]) => h("div", { class: number === line ? "blamed" : null }, h("span", {}, String(number)), text.slice(margin) || " ")));
  }
  function moments(offender) {  // when it happened, as ticks on a line the length of the session
    const whole = span(), stalls = offender.stalls.map(n => byNumber.get(n));
    return s("svg", { width: 260, height: 16, viewBox: "0 0 260 16", "aria-hidden": "true" },
      s("line", { class: "ground", x1: 0, x2: 260, y1: 12.5, y2: 12.5 }),
      ...stalls.slice(0, 400).map(stall => s("rect", { class: "stall c-" + stall.cause, x: (stall.at / whole * 257).toFixed(1), y: 3, width: Math.max(2.5, stall.for / whole * 257).toFixed(1), height: 9, rx: 1 })));
  }
  function firstAndLast(offender) {
    const [first, last] = [offender.stalls[0], offender.stalls[offender.stalls.length - 1]].map(n => clock(byNumber.get(n).at, 0.1));
    return offender.stalls.length === 1 ? "at " + first : "first at " + first + ", last at " + last;
  }
  function contributors(stall) {
    if (!stall.contributors) return null;
    return h("dl", { class: "pairs", style: { "margin-top": "12px" } }, ...stall.contributors.slice(0, 5).flatMap(([name, seconds]) => [h("dt", {}, time(seconds)), h("dd", { class: "mono" }, name)]));
  }

  // ---- tree ----
  function drawTree() {
    const root = branch(), several = new Set(data.stalls.map(stall => stall.loop)).size > 1;
    for (const stall of shown()) for (const [id, seconds] of stall.stacks || []) {
      let node = root;
      add(root, stall, seconds);
      if (several) node = add(child(root, "loop " + stall.loop, null), stall, seconds);
      for (const index of data.stacks[id]) node = add(child(node, index, index), stall, seconds);
    }
    $("tree").hidden = !root.kids.size;
    $("tree-root").replaceChildren(...rows(root, root.seconds, 0));
    for (const node of [...$("tree-root").children].slice(0, 1)) unfold(node);
  }
  function branch(name, index) { return { name, index, seconds: 0, causes: new Map(), kids: new Map() }; }
  function child(node, name, index) {
    if (!node.kids.has(name)) node.kids.set(name, branch(name, index));
    return node.kids.get(name);
  }
  function add(node, stall, seconds) {
    node.seconds += seconds;
    node.causes.set(stall.cause, (node.causes.get(stall.cause) || 0) + seconds);
    return node;
  }
  function rows(node, all, depth) { return [...node.kids.values()].sort((a, b) => b.seconds - a.seconds).map(kid => row(kid, all, depth)); }
  function row(node, all, depth) {
    const cause = [...node.causes].sort((a, b) => b[1] - a[1])[0][0], part = node.seconds / all;
    const at = node.index === null ? null : frame(node.index);
    const cells = [
      h("span", { class: "time" }, time(node.seconds)), h("span", { class: "part" }, percent(part)),
      h("span", { class: "meter" }, h("i", { style: { width: (part * 100).toFixed(2) + "%" } })),
      h("span", { class: "call" }, h("b", {}, at ? at.name : node.name), at && h("span", { class: "place" }, at.file + ":" + at.line), at && !node.kids.size && at.source && h("code", {}, at.source)),
    ];
    const look = { "--depth": String(depth) };
    if (!node.kids.size) return h("div", { class: "leaf c-" + cause, style: look }, ...cells);
    const kids = h("div", {}), box = h("details", { class: "node c-" + cause }, h("summary", { style: look }, ...cells), kids);
    box.fill = () => { if (!kids.childElementCount) kids.replaceChildren(...rows(node, all, depth + 1)); };
    box.addEventListener("toggle", () => {
      box.fill();
      if (box.open && kids.childElementCount === 1) unfold(kids.firstChild);  // nothing to choose: on to the next fork
    });
    return box;
  }
  function unfold(box) {
    for (; box && box.fill; box = box.lastChild.firstChild) { box.fill(); box.open = true; }
  }

  // ---- loops ----
  function drawLoops() {
    $("loops-body").append(...loops.filter(loop => loop.watched || loop.iterations).map(loop => h("tr", {},
      h("th", { scope: "row" }, loop.name, h("small", {}, [loop.resource ? "resource" : "", loop.thread && loop.thread !== loop.name ? "thread " + loop.thread : "", loop.precision].filter(Boolean).join(", "))),
      h("td", { class: "number" }, loop.watched ? percent(loop.busy / loop.watched) : "–"), h("td", { class: "number" }, loop.iterations.toLocaleString("en")),
      h("td", { class: "number" }, time(loop.longest)), h("td", {}, histogram(loop)))));
  }
  function histogram(loop) {
    const counts = loop.histogram, first = 10, last = Math.max(31, counts.length - 1), over = Math.log2(data.threshold * 1e9);
    if (!sum(counts)) return h("span", { class: "place" }, "not measured");
    const bins = [sum(counts.slice(0, first + 1)), ...Array.from({ length: last - first }, (_, n) => counts[first + 1 + n] || 0)];
    const most = Math.log1p(Math.max(...bins)), w = 8, mark = (bit, text) => s("text", { x: (bit - first + 1) * w, y: 44, "text-anchor": "middle" }, text);
    const slow = sum(bins.filter((_, n) => first + n - 1 >= over));
    return s("svg", { class: "histogram", width: bins.length * w + 8, height: 48, viewBox: "0 0 " + (bins.length * w + 8) + " 48", role: "img", "aria-label": "Turns by duration, logarithmic: " + count(sum(counts), "turn") + ", of which " + slow + " surely over the limit" },
      ...bins.map((n, index) => n && s("rect", { class: first + index - 1 >= Math.floor(over) ? "over" : null, x: index * w, width: w - 2, y: 32 - Math.max(2, Math.log1p(n) / most * 30), height: Math.max(2, Math.log1p(n) / most * 30), rx: 1 })),
      s("line", { class: "ground", x1: 0, x2: bins.length * w, y1: 32.5, y2: 32.5 }), mark(13.3, "10 µs"), mark(19.93, "1 ms"), mark(26.57, "0.1 s"));
  }

  // ---- all stalls ----
  const COLUMNS = [
    ["n", "#", "n", stall => stall.n], ["at", "At", "at", stall => stall.at], ["loop", "Loop", "loop", stall => stall.loop],
    ["cause", "Cause", "cause", stall => title(stall.cause)], ["where", "Where", "where", stall => stall.where], ["for", "Duration", "for number", stall => stall.for],
  ];
  function sorted() {
    const key = COLUMNS.find(([name]) => name === state.sort)[3], sign = state.down ? -1 : 1;
    return [...shown()].sort((a, b) => (key(a) < key(b) ? -1 : key(a) > key(b) ? 1 : a.n - b.n) * sign);
  }
  function drawStalls() {
    $("stalls-head").replaceChildren(...COLUMNS.map(([name, label, look]) => h("th", { scope: "col", class: look, "aria-sort": state.sort === name ? (state.down ? "descending" : "ascending") : null },
      h("button", { type: "button", "data-sort": name, onclick: () => {
        state.down = state.sort === name ? !state.down : name === "for"; state.sort = name;
        drawStalls();
        document.querySelector('[data-sort="' + name + '"]').focus();
      } }, label))));
    const all = sorted();
    $("stalls-count").textContent = state.cause ? count(all.length, "stall") + " of " + data.stalls.length : "";
    $("stalls-body").replaceChildren(...all.slice(0, state.rows).map(stall => h("tr", { onclick: () => open(stall.n) },
      h("td", { class: "n" }, h("button", { type: "button", "aria-label": "Details of stall " + stall.n }, String(stall.n))),
      h("td", { class: "at" }, clock(stall.at, 0.01)), h("td", { class: "loop" }, stall.loop), h("td", { class: "cause" }, dot(stall.cause), title(stall.cause)),
      h("td", { class: "where", title: stall.where }, dot(stall.cause), stall.where), h("td", { class: "for number" }, time(stall.for) + (stall.ongoing ? "+" : "")))));
    more($("more-stalls"), all.length - state.rows, () => { state.rows += 500; drawStalls(); });
  }

  // ---- one stall ----
  function open(number) {
    const stall = byNumber.get(number);
    if (!stall) return;
    state.selected = number;
    drawDetail(stall);
    if (!$("detail").open) $("detail").showModal();
    $("detail").scrollTop = 0;
    history.replaceState(null, "", "#stall-" + number);
    if (lanes.axis) drawView();
  }
  function step(by) {
    const all = sorted(), index = all.findIndex(stall => stall.n === state.selected);
    if (all[index + by]) { open(all[index + by].n); say(sentence(all[index + by])); }
  }
  function drawDetail(stall) {
    const all = sorted(), index = all.indexOf(stall);
    $("previous").disabled = index <= 0; $("next").disabled = index < 0 || index >= all.length - 1;
    const pairs = [
      ["Loop", stall.loop], ["Began", clock(stall.at, 0.001) + " into the session"], ["Limit", time(stall.limit)], ["Task", stall.task], ["Coroutine", stall.coroutine], ["Started by task", stall.parent],
      ["Callback", stall.callback], ["Callbacks in that turn", stall.callbacks > 1 && stall.callbacks], ["Others that waited", stall.waited || null],
      ["Held by", stall.holder !== undefined && frame(stall.holder).name + ", " + frame(stall.holder).file + ":" + frame(stall.holder).line],
      ...Object.entries(stall.context || {}), ["Samples", String(stall.samples) + (stall.precision === "exact" ? "" : ", " + stall.precision)],
    ].filter(([, value]) => value);
    const stack = data.stacks[stall.stack] || [], outside = stall.outside || 0;
    const blamed = stack.lastIndexOf(stall.frame);
    $("detail-body").className = "c-" + stall.cause;
    $("detail-body").replaceChildren(
      h("h2", { id: "detail-title" }, h("small", {}, "Stall " + stall.n), time(stall.for) + (stall.ongoing ? ", and still on when the report was made" : "")),
      h("p", { class: "tags" }, verdict(stall.verdict), h("span", { class: "tag" }, dot(stall.cause), title(stall.cause)), h("span", {}, stall.why)),
      h("p", { class: "place mono" }, stall.where),
      code(sources.get(stall.n) || [], stall),
      stall.advice && h("p", { class: "fix" }, h("strong", {}, "Fix: "), prose(stall.advice)),
      ...numbers(stall),
      h("h3", {}, "What"), h("dl", { class: "pairs" }, ...pairs.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, String(value))])),
      ...(stall.contributors ? [h("h3", {}, "What took longest in that turn"), contributors(stall)] : []),
      ...(stall.chain ? [h("h3", {}, "Await chain of the task"), h("ol", { class: "frames" }, ...stall.chain.map(at => line(at)))] : []),
      ...(stack.length ? [h("h3", {}, "Stack, outermost first"),
        outside > 0 && h("details", { class: "machinery" }, h("summary", {}, count(outside, "frame") + " that started the loop"), h("ol", { class: "frames" }, ...stack.slice(0, outside).map(at => line(at, false, true)))),
        h("ol", { class: "frames" }, ...stack.slice(outside).map((at, n) => line(at, n + outside === blamed)))] : []),
      ...((stall.stacks || []).length > 1 ? [h("h3", {}, "Where the samples were"), h("dl", { class: "pairs" },
        ...stall.stacks.flatMap(([id, seconds]) => { const at = frame(data.stacks[id][data.stacks[id].length - 1]); return [h("dt", {}, percent(seconds / stall.for)), h("dd", { class: "mono" }, at.name + ", " + at.file + ":" + at.line)]; }))] : []));
  }
  function line(index, blamed, far) {
    const at = frame(index);
    return h("li", { class: blamed ? "blamed" : far ? "far" : null }, h("b", {}, at.name), " ", h("span", { class: "place mono" }, at.file + ":" + at.line), at.source && h("code", {}, at.source));
  }
  function numbers(stall) {
    const values = stall.numbers || {};
    const known = [["cpu", "on a processor", "cpu-python"], ["wait", "waiting", "wait"], ["gil", "waiting for the GIL", "gil"],
      ["runqueue", "ready, without a processor", "descheduled"], ["stopped", "with the process stopped", "stopped"]];
    const parts = known.filter(([key]) => values[key] > 0.00005).map(([key, label, look]) => [values[key], label, look]);
    if (!parts.length) return [];
    const rest = stall.for - sum(parts.map(([value]) => value));
    if (rest > stall.for * 0.02) parts.push([rest, values.wait === undefined ? "waiting" : "not told", values.wait === undefined ? "wait" : "unknown"]);
    const extra = [["gc", "in the garbage collector"], ["others_cpu", "of processor time in other threads"]].filter(([key]) => values[key] > 0.0005).map(([key, label]) => [values[key], label, null]);
    return [h("h3", {}, "Where the time went"),
      h("div", { class: "shares", "aria-hidden": "true" }, ...parts.map(([value, , look]) => h("i", { class: "c-" + look, style: { width: Math.min(100, value / stall.for * 100).toFixed(2) + "%" } }))),
      h("dl", { class: "pairs", style: { "margin-top": "10px" } }, ...[...parts, ...extra].flatMap(([value, label, look]) => [h("dt", {}, look && dot(look), look && "\u2002", time(value)), h("dd", {}, label)]))];
  }

  // ---- all together ----
  function drawFiltered() { drawCauses(); drawView(); drawOffenders(); drawTree(); drawStalls(); }
  drawHeader();
  drawLoops();
  for (const id of ["timeline", "loops"]) $(id).hidden = !loops.length;
  if (data.stalls.length) for (const id of ["causes", "offenders", "stalls"]) $(id).hidden = false;
  else drawEmpty();
  drawLanes();
  if (data.stalls.length) drawFiltered();
  let known = width();
  new ResizeObserver(() => { const w = width(); if (w !== known) { known = w; drawView(); } }).observe($("lanes"));
  $("zoom-in").onclick = () => zoomBy(0.5);
  $("zoom-out").onclick = () => zoomBy(2);
  $("zoom-all").onclick = () => zoom(0, span());
  $("all").onclick = () => choose(null);
  $("previous").onclick = () => step(-1);
  $("next").onclick = () => step(1);
  $("close").onclick = () => $("detail").close();
  $("detail").addEventListener("close", () => history.replaceState(null, "", location.pathname + location.search));
  $("detail").addEventListener("click", event => { if (event.target === $("detail")) $("detail").close(); });
  $("detail").addEventListener("keydown", event => { const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key]; if (by) { step(by); event.preventDefault(); } });
  addEventListener("scroll", hideTip, { passive: true });
  const linked = /^#stall-(\d+)$/.exec(location.hash);
  if (linked) open(Number(linked[1]));
})();
