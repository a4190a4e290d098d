// Shared by all plots: the page's data, colours, scales and the drawing of a plot when it comes into view.
"use strict";
const preftune = (() => {
  const root = document.documentElement;
  const element = document.getElementById("preftune-data");
  const data = element ? JSON.parse(element.textContent) : { runs: [], plots: [], sweeps: [], evals: [] };
  const drawers = new Map();
  const state = { axis: "step", smooth: false, hidden: new Set() };

  /** Numbers out of base64; the arrays are kept, because every plot asks for the axes. */
  const cache = new WeakMap();
  function numbers(packed) {
    if (!packed) return null;
    if (!cache.has(packed)) {
      const text = atob(packed.data);
      const bytes = new Uint8Array(text.length);
      for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
      cache.set(packed, packed.type === "f8" ? new Float64Array(bytes.buffer) : new Float32Array(bytes.buffer));
    }
    return cache.get(packed);
  }

  const color = (name) => getComputedStyle(root).getPropertyValue("--" + name).trim();
  const runColor = (index) => color("c" + (index % 8));
  /** The plotting library reads a few tags in its labels; names must not become any. */
  const text = (value) => String(value).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const short = (value, length = 28) => {
    const whole = String(value);
    return text(whole.length > length ? whole.slice(0, length - 1) + "…" : whole);
  };
  function shown(value) {
    if (value === null || value === undefined) return "–";
    if (typeof value !== "number") return String(value);
    const size = Math.abs(value);
    if (size && (size < 1e-3 || size >= 1e6)) return value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e");
    return String(Number(value.toPrecision(3)));
  }

  /** An estimate and the ends of its interval, to the two digits of the interval's width that mean something. */
  function rounded(value, unit = 1) {
    const all = [value.mean, value.low, value.high].filter((one) => one !== undefined && one !== null).map((one) => unit * one);
    const width = all.length === 3 ? all[2] - all[1] : 0;
    const decimals = width > 0 ? Math.max(0, 1 - Math.floor(Math.log10(width * 1.0001))) : unit === 100 ? 1 : null;
    const one = (each) => decimals === null || decimals > 6 ? (Math.abs(each) < 1e-3 ? shown(each) : String(Number(each.toPrecision(4)))) : (Math.round(each * 10 ** decimals) / 10 ** decimals + 0).toFixed(decimals);
    return all.map((each) => one(each).replace(/^-/, "−"));
  }

  function layout(extra) {
    const ink = color("muted"), grid = color("grid");
    const axis = { gridcolor: grid, linecolor: grid, zeroline: false, automargin: true, tickfont: { color: ink }, fixedrange: false };
    const base = {
      autosize: true, margin: { l: 48, r: 12, t: 8, b: 40 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: ink }, showlegend: false,
      hoverlabel: { bgcolor: color("surface"), bordercolor: color("line"), font: { color: color("ink"), size: 12 } },
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { color: color("ink") } }, dragmode: "zoom",
    };
    const merged = { ...base, ...extra };
    merged.xaxis = { ...axis, ...(extra.xaxis || {}) };
    merged.yaxis = { ...axis, ...(extra.yaxis || {}) };
    return merged;
  }
  const config = { displayModeBar: false, responsive: true, showTips: false, doubleClick: "reset", staticPlot: false };

  /** Registers what draws a plot: a function that returns `{traces, layout}`. */
  const register = (key, drawer) => drawers.set(key, drawer);
  const host = (key) => document.querySelector('[data-plot="' + CSS.escape(key) + '"]');

  function draw(key) {
    const place = host(key), drawer = drawers.get(key);
    if (!place || !drawer) return;
    const made = drawer(place);
    const shape = layout(made.layout || {});
    if (place.classList.contains("drawn")) {
      Plotly.react(place, made.traces, shape, config);
      return;
    }
    const waiting = place.querySelector(".waiting");
    if (waiting) waiting.remove();
    place.classList.add("drawn");
    // Phones scroll with the finger that would zoom.
    if (matchMedia("(pointer: coarse)").matches) shape.dragmode = false;
    Plotly.newPlot(place, made.traces, shape, config);
    if (made.zoomed) place.on("plotly_relayout", (change) => made.zoomed(place, change));
  }
  const drawn = () => [...drawers.keys()].filter((key) => host(key)?.classList.contains("drawn"));
  const redraw = (keys = drawn()) => keys.forEach(draw);
  const drawAll = () => [...drawers.keys()].forEach((key) => { if (!host(key)?.classList.contains("drawn")) draw(key); });

  /** Draws what is on the screen first, the rest when it comes near. */
  function watch() {
    const soon = new IntersectionObserver((entries) => {
      for (const entry of entries) {
        if (!entry.isIntersecting) continue;
        soon.unobserve(entry.target);
        draw(entry.target.dataset.plot);
      }
    }, { rootMargin: "300px 0px" });
    for (const place of document.querySelectorAll("[data-plot]:not(.drawn)")) soon.observe(place);
  }

  return { data, state, numbers, color, runColor, text, short, shown, rounded, layout, config, register, host, draw, drawn, redraw, drawAll, watch };
})();
