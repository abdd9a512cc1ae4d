"use strict";
// Draws the curves of a page. Text reaches the page by textContent only, never as markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const controls = document.getElementById("controls");
  const COLOURS = 8, VALUE = 3, LOW = 4, HIGH = 5;
  const AXES = ["optimizer steps", "training tokens", "training time"];
  const MARGIN = { top: 12, right: 16, bottom: 40, left: 62 };

  const make = (name, attributes = {}, text) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const shortened = (value) => {
    for (const [limit, unit] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
      if (Math.abs(value) >= limit) return `${Number((value / limit).toPrecision(3))}${unit}`;
    }
    return String(Number(value.toPrecision(3)));
  };
  // Seconds are counted in the unit that suits the whole axis, so that its numbers are round.
  const unitOf = (axis, right) => {
    if (axis !== 2) return [1, ""];
    return [[86400, " d"], [3600, " h"], [60, " min"]].find(([size]) => right >= 2 * size) ?? [1, " s"];
  };
  const exact = (value, chart) => {
    if (chart.digits === 0) return shortened(value);
    return chart.digits === null ? value.toExponential(2) : value.toFixed(chart.digits);
  };

  // Round numbers between two bounds, about `wanted` of them.
  const ticks = (low, high, wanted) => {
    if (!(high > low)) return [low];
    const rough = (high - low) / wanted, power = 10 ** Math.floor(Math.log10(rough));
    const off = (factor) => Math.abs(Math.log((factor * power) / rough));
    const step = [1, 2, 2.5, 5, 10].reduce((best, factor) => (off(factor) < off(best) ? factor : best)) * power;
    const found = [];
    for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n += 1) found.push(n * step);
    return found;
  };
  const logTicks = (low, high) => {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power += 1) {
      for (const factor of [1, 2, 5]) {
        const value = factor * 10 ** power;
        if (value >= low && value <= high) found.push(value);
      }
    }
    return found.length > 9 ? found.filter((value) => Number.isInteger(Math.round(Math.log10(value) * 1e6) / 1e6)) : found;
  };

  const choices = () => {
    const form = new FormData(controls);
    return {
      axis: Number(form.get("axis")),
      log: form.get("log") !== null,
      whole: form.get("whole") !== null,
      runs: controls.elements.run ? new Set(form.getAll("run").map(Number)) : null,
    };
  };

  const draw = (chart) => {
    const figure = document.getElementById(`chart-${chart.name}`);
    const plot = figure.querySelector(".plot"), readout = figure.querySelector(".readout");
    const chosen = choices();
    readout.replaceChildren();
    const shown = chart.curves
      .map((curve) => ({ ...curve, points: curve.points.filter((p) => p[chosen.axis] !== null && (!chosen.log || p[chosen.axis] > 0)) }))
      .filter((curve) => (chosen.runs === null || chosen.runs.has(curve.style)) && curve.points.length > 0);
    if (shown.length === 0) {
      const empty = document.createElement("p");
      empty.className = "empty";
      empty.textContent = "nothing to show";
      plot.replaceChildren(empty);
      return;
    }

    const width = Math.max(plot.clientWidth || 640, 280), height = 288;
    const xs = shown.flatMap((curve) => curve.points.map((p) => p[chosen.axis]));
    let [left, right] = [Math.min(...xs), Math.max(...xs)];
    if (!chosen.log) left = Math.min(left, 0);
    if (right === left) right = left + 1;
    const [unit, suffix] = unitOf(chosen.axis, right);
    const along = (value) => shortened(value / unit) + suffix;
    const spread = chosen.log ? (v) => Math.log(v) : (v) => v;
    const x = (v) => MARGIN.left + ((spread(v) - spread(left)) / (spread(right) - spread(left))) * (width - MARGIN.left - MARGIN.right);

    // A loss falls by most of its height at the very start; what follows is worth the room.
    const values = shown.flatMap((curve) => curve.points.flatMap((p) => p.slice(VALUE)));
    const late = shown.flatMap((curve) => {
      const end = curve.points[curve.points.length - 1][chosen.axis];
      return curve.points.filter((p) => p[chosen.axis] >= 0.1 * end).map((p) => p[VALUE]);
    });
    const falls = chart.falls;
    let low = Math.min(...values), high = Math.max(...values);
    if (falls && !chosen.whole && !chosen.log) high = Math.max(...late);
    const cut = high < Math.max(...values);
    if (!falls) low = Math.min(low, 0);
    if (high === low) { high += Math.abs(high) * 0.1 || 1; low -= falls ? Math.abs(low) * 0.1 || 1 : 0; }
    const pad = 0.05 * (high - low);
    [low, high] = [falls ? low - pad : low, high + pad];
    const y = (v) => height - MARGIN.bottom - ((v - low) / (high - low)) * (height - MARGIN.top - MARGIN.bottom);

    const ends = shown.map((curve) => `${curve.label} ends at ${exact(curve.points[curve.points.length - 1][VALUE], chart)}`.trim());
    const svg = make("svg", {
      viewBox: `0 0 ${width} ${height}`, role: "img", tabindex: "0",
      "aria-label": `${chart.title} by ${AXES[chosen.axis]}: ${ends.join("; ")}. Arrow keys read single values.`,
    });
    const clip = `clip-${chart.name}`;
    const clipPath = make("clipPath", { id: clip });
    clipPath.append(make("rect", { x: MARGIN.left, y: MARGIN.top - 4, width: width - MARGIN.left - MARGIN.right + 8, height: height - MARGIN.top - MARGIN.bottom + 8 }));
    svg.append(clipPath);
    for (const value of ticks(low, high, 6)) {
      svg.append(make("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(value), y2: y(value) }));
      const text = chart.digits === null && value ? value.toExponential(1) : shortened(value);
      svg.append(make("text", { x: MARGIN.left - 8, y: y(value) + 4, "text-anchor": "end" }, text));
    }
    const bounds = [left / unit, right / unit];
    const marks = chosen.log ? logTicks(...bounds) : ticks(...bounds, width > 520 ? 7 : 4);
    for (const value of marks.map((mark) => mark * unit)) {
      svg.append(make("line", { class: "grid", x1: x(value), x2: x(value), y1: MARGIN.top, y2: height - MARGIN.bottom }));
      svg.append(make("text", { x: x(value), y: height - MARGIN.bottom + 18, "text-anchor": "middle" }, along(value)));
    }
    svg.append(make("line", { class: "base", x1: MARGIN.left, x2: width - MARGIN.right, y1: height - MARGIN.bottom, y2: height - MARGIN.bottom }));
    svg.append(make("text", { x: (MARGIN.left + width - MARGIN.right) / 2, y: height - 6, "text-anchor": "middle" }, AXES[chosen.axis] + (cut ? " (the start is cut off)" : "")));
    const curves = make("g", { "clip-path": `url(#${clip})` });
    for (const { points, style } of shown) {
      const ranges = points.filter((p) => p.length > HIGH);
      if (ranges.length === 0) continue;
      const edge = (column) => ranges.map((p) => `${x(p[chosen.axis]).toFixed(1)} ${y(p[column]).toFixed(1)}`);
      curves.append(make("path", { class: `band f${style % COLOURS}`, d: `M${[...edge(HIGH), ...edge(LOW).reverse()].join("L")}Z` }));
    }
    for (const { points, style, marks } of shown) {
      const path = points.map((p, n) => `${n ? "L" : "M"}${x(p[chosen.axis]).toFixed(1)} ${y(p[VALUE]).toFixed(1)}`).join("");
      curves.append(make("path", { class: `line c${style % COLOURS} d${style % 4}`, d: path }));
      // Between evaluations nothing was measured.
      if (marks) {
        for (const p of points) curves.append(make("circle", { class: `mark f${style % COLOURS}`, cx: x(p[chosen.axis]), cy: y(p[VALUE]), r: 2.5 }));
      }
      const last = points[points.length - 1];
      curves.append(make("circle", { class: `mark f${style % COLOURS}`, cx: x(last[chosen.axis]), cy: y(last[VALUE]), r: 4 }));
    }
    svg.append(curves);
    const cursor = make("g", { visibility: "hidden" });
    svg.append(cursor);

    // Every place where some run has a point, for the keys.
    const places = [...new Set(xs)].sort((a, b) => a - b);
    let place = -1;
    const nearest = (points, at) => points.reduce((best, p) => (Math.abs(p[chosen.axis] - at) < Math.abs(best[chosen.axis] - at) ? p : best));
    const write = (title, found) => {
      const where = document.createElement("span");
      where.className = "where";
      where.textContent = title;
      readout.replaceChildren(where);
      for (const [curve, point] of found) {
        const one = document.createElement("span"), swatch = document.createElement("span");
        one.className = "one";
        swatch.className = `swatch f${curve.style % COLOURS}`;
        const range = point.length > HIGH ? ` (${exact(point[LOW], chart)} to ${exact(point[HIGH], chart)})` : "";
        one.append(swatch, `${curve.label} ${exact(point[VALUE], chart)}${range}`);
        readout.append(one);
      }
    };
    const read = (at) => {
      cursor.replaceChildren(make("line", { class: "cursor", x1: x(at), x2: x(at), y1: MARGIN.top, y2: height - MARGIN.bottom }));
      cursor.setAttribute("visibility", "visible");
      const found = [];
      for (const curve of shown) {
        const { points, style } = curve;
        if (at > points[points.length - 1][chosen.axis] * 1.02) continue;
        const point = nearest(points, at);
        found.push([curve, point]);
        if (point[VALUE] <= high) cursor.append(make("circle", { class: `mark f${style % COLOURS}`, cx: x(point[chosen.axis]), cy: y(point[VALUE]), r: 4 }));
      }
      write(`${along(at)} ${AXES[chosen.axis]}`, found);
    };
    const clear = () => {
      place = -1;
      cursor.setAttribute("visibility", "hidden");
      readout.removeAttribute("aria-live");
      write("at the end", shown.map((curve) => [curve, curve.points[curve.points.length - 1]]));
    };
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const share = ((event.clientX - box.left) * (width / box.width) - MARGIN.left) / (width - MARGIN.left - MARGIN.right);
      const inside = Math.min(Math.max(share, 0), 1), at = spread(left) + inside * (spread(right) - spread(left));
      const wanted = chosen.log ? Math.exp(at) : at;
      read(places.reduce((best, p) => (Math.abs(p - wanted) < Math.abs(best - wanted) ? p : best)));
    });
    svg.addEventListener("pointerleave", clear);
    svg.addEventListener("blur", clear);
    svg.addEventListener("keydown", (event) => {
      const far = Math.max(1, Math.round(places.length / 10));
      const moves = { ArrowRight: 1, ArrowLeft: -1, PageUp: far, PageDown: -far };
      if (event.key === "Escape") { clear(); return; }
      if (event.key === "Home") place = 0;
      else if (event.key === "End") place = places.length - 1;
      else if (event.key in moves) place = Math.min(Math.max(place + moves[event.key], 0), places.length - 1);
      else return;
      event.preventDefault();
      // Spoken where keys ask for it, and not at each move of a pointer.
      readout.setAttribute("aria-live", "polite");
      read(places[place]);
    });
    plot.replaceChildren(svg);
    clear();
  };

  const redraw = () => data.charts.forEach(draw);
  // What a visitor has chosen and opened is kept in the address, also while the page reloads.
  const details = [...document.querySelectorAll("details[id]")];
  const kept = new URLSearchParams(location.hash.slice(1));
  if (kept.has("axis")) {
    for (const input of controls.querySelectorAll("input")) input.checked = kept.getAll(input.name).includes(input.value);
    for (const one of details) one.open = kept.getAll("open").includes(one.id);
  }
  const keep = () => {
    const chosen = new URLSearchParams(new FormData(controls));
    for (const one of details) if (one.open) chosen.append("open", one.id);
    history.replaceState(null, "", `#${chosen}`);
  };
  controls.addEventListener("change", () => { keep(); redraw(); });
  for (const one of details) one.addEventListener("toggle", keep);
  controls.addEventListener("submit", (event) => event.preventDefault());
  let waiting = 0;
  window.addEventListener("resize", () => {
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(redraw);
  });
  redraw();

  // A page of a running run loads itself again, unless that would interrupt its reader.
  if (data.reload) {
    const written = document.querySelector("time").dateTime, quiet = document.getElementById("quiet");
    const busy = () => document.hidden || document.querySelector("figure:hover, figure:focus-within") || !getSelection().isCollapsed;
    setInterval(() => {
      const silent = (Date.now() - Date.parse(written)) / 1000;
      if (silent > 300 + 10 * data.reload) {
        quiet.hidden = false;
        quiet.textContent = `No update for ${Math.round(silent / 60)} minutes: the run may have ended without finishing this page.`;
      }
      if (controls.elements.follow.checked && !busy()) location.reload();
    }, 1000 * data.reload);
  }
})();
