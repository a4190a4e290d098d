// Curves over steps, tokens or time: all values stay in the page, as many as the screen can show are drawn.
(() => {
  const { data, state, numbers, color, runColor, short, text } = preftune;
  const MAX_POINTS = 1200;
  const zoom = new Map();

  /** First position in an ascending array whose value is not below `limit`. */
  function position(values, limit) {
    let low = 0, high = values.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (values[middle] < limit) low = middle + 1; else high = middle;
    }
    return low;
  }

  /** Lowest and highest value of every bucket, in their order: spikes survive, and lines look as if all were drawn. */
  function thin(x, y, range) {
    const from = range ? Math.max(0, position(x, range[0]) - 1) : 0;
    const to = range ? Math.min(x.length, position(x, range[1]) + 1) : x.length;
    const count = to - from;
    if (count <= MAX_POINTS) return [Array.from(x.subarray(from, to)), Array.from(y.subarray(from, to))];
    const outX = [], outY = [], buckets = MAX_POINTS / 2;
    for (let bucket = 0; bucket < buckets; bucket++) {
      const start = from + Math.floor(bucket * count / buckets), end = from + Math.floor((bucket + 1) * count / buckets);
      let low = start, high = start;
      for (let i = start + 1; i < end; i++) {
        if (y[i] < y[low]) low = i;
        if (y[i] > y[high]) high = i;
      }
      for (const i of low < high ? [low, high] : low > high ? [high, low] : [low]) { outX.push(x[i]); outY.push(y[i]); }
    }
    return [outX, outY];
  }

  /** Mean over a centred window of one fiftieth of the line. */
  function smoothed(y) {
    const half = Math.max(1, Math.round(y.length / 100)), sums = new Float64Array(y.length + 1), out = new Float32Array(y.length);
    for (let i = 0; i < y.length; i++) sums[i + 1] = sums[i] + y[i];
    for (let i = 0; i < y.length; i++) {
      const from = Math.max(0, i - half), to = Math.min(y.length, i + half + 1);
      out[i] = (sums[to] - sums[from]) / (to - from);
    }
    return out;
  }

  /** Time in the unit that fits the longest run. */
  function unit() {
    let longest = 0;
    for (const run of data.runs) {
      const time = numbers(run.curves.axes.time);
      if (time && time.length) longest = Math.max(longest, time[time.length - 1]);
    }
    return longest > 10800 ? [3600, "hours"] : longest > 300 ? [60, "minutes"] : [1, "seconds"];
  }

  const scaled = new WeakMap();
  function axisOf(run) {
    const packed = run.curves.axes[state.axis];
    if (!packed) return null;
    const values = numbers(packed);
    if (state.axis !== "time") return values;
    if (!scaled.has(packed)) scaled.set(packed, values.map((seconds) => seconds / unit()[0]));
    return scaled.get(packed);
  }

  function pick(axis, packedRows) {
    const rows = numbers(packedRows);
    if (!rows) return axis;
    const out = new Float64Array(rows.length);
    for (let i = 0; i < rows.length; i++) out[i] = axis[rows[i]];
    return out;
  }

  function lineStyle(index, role, split, several, roles) {
    const colorOf = several ? runColor(index) : roles > 1 ? runColor(role) : runColor(split === "eval" ? 1 : 0);
    // Colours come round after eight runs; the strokes then tell them apart.
    const dash = split === "eval" ? "dot" : several && index >= 8 ? "longdashdot" : several && role === 1 ? "dash" : "solid";
    return { color: colorOf, width: split === "eval" ? 2 : 1.8, dash };
  }

  function traces(plot) {
    const out = [], several = data.runs.length > 1, range = zoom.get(state.axis);
    data.runs.forEach((run, index) => {
      const axis = axisOf(run);
      if (!axis || state.hidden.has(index)) return;
      plot.metrics.forEach(([metric, label], role) => {
        for (const split of ["train", "eval"]) {
          const curve = run.curves[split][metric];
          if (!curve) continue;
          const x = pick(axis, curve.rows), y = numbers(curve.values), line = lineStyle(index, role, split, several, plot.metrics.length);
          const name = (several ? short(run.name) + ": " : "") + text(label) + (split === "eval" ? ", held-out" : "");
          const smooth = state.smooth && split === "train" && y.length > 20;
          if (smooth) {
            const [rawX, rawY] = thin(x, y, range);
            out.push({ x: rawX, y: rawY, type: "scatter", mode: "lines", line: { ...line, width: 1 }, opacity: 0.25, hoverinfo: "skip", showlegend: false });
          }
          out.push(...band(run.curves[split], metric, x, line.color, range));
          const [thinX, thinY] = thin(x, smooth ? smoothed(y) : y, range);
          const few = thinX.length === 1 || (split === "eval" && thinX.length <= 60);
          out.push({
            x: thinX, y: thinY, type: "scatter", mode: few ? "lines+markers" : "lines", line, name, marker: { size: 6, symbol: role ? "diamond" : "circle" },
            hovertemplate: "%{y:.4g}<extra>" + name + "</extra>",
          });
        }
      });
      out.push(...alarmTraces(run, index, axis));
    });
    return out;
  }

  /** The interval of a metric that is logged with its ends, as a pale area behind its line. */
  function band(curves, metric, x, stroke, range) {
    const ends = ["_high", "_low"].map((end) => curves[metric + end]).map((curve) => curve && numbers(curve.values));
    if (!ends.every((end) => end && end.length === x.length)) return [];
    return ends.map((y, at) => {
      const [thinX, thinY] = thin(x, y, range);
      return { x: thinX, y: thinY, type: "scatter", mode: "lines", line: { width: 0, color: stroke }, opacity: 0.6, hoverinfo: "skip", showlegend: false, ...(at ? { fill: "tonexty", fillcolor: stroke + "33" } : {}) };
    });
  }

  /** Triangles at the upper edge, one for each alarm, over every plot at the same place. */
  function alarmTraces(run, index, axis) {
    if (!run.alarms.length) return [];
    const steps = numbers(run.curves.axes.step);
    if (!steps.length) return [];
    const x = run.alarms.map((alarm) => axis[Math.min(steps.length - 1, position(steps, alarm.step))]);
    const names = run.alarms.map((alarm) => "alarm: " + short(alarm.guard.replace(/_/g, " "), 40) + (alarm.action === "stop" ? " (stopped)" : ""));
    return [{
      x, y: x.map(() => 0.965), yaxis: "y2", type: "scatter", mode: "markers", name: "alarms", showlegend: false, cliponaxis: false,
      marker: { symbol: "triangle-down", size: 11, color: color("bad"), line: { width: 1, color: color("surface") } },
      text: names, hovertemplate: "%{text}<extra></extra>", meta: index,
    }];
  }

  function shapesOf(plot) {
    const shapes = [];
    if (plot.level !== null) {
      shapes.push({ type: "line", xref: "paper", x0: 0, x1: 1, y0: plot.level, y1: plot.level, line: { color: color("muted"), width: 1, dash: "dash" }, layer: "below" });
    }
    data.runs.forEach((run, index) => {
      const axis = axisOf(run), steps = numbers(run.curves.axes.step);
      if (!axis || state.hidden.has(index) || !steps.length) return;
      for (const alarm of run.alarms.slice(0, 30)) {
        const x = axis[Math.min(steps.length - 1, position(steps, alarm.step))];
        shapes.push({ type: "line", x0: x, x1: x, yref: "paper", y0: 0, y1: 1, line: { color: color("bad"), width: 1, dash: "dot" }, layer: "below", opacity: 0.6 });
      }
    });
    return shapes;
  }

  /** What the level line stands for, at its right end. */
  function levelName(plot) {
    if (plot.level === null || !plot.levelLabel) return [];
    return [{ xref: "paper", x: 1, xanchor: "right", y: plot.level, yanchor: "bottom", text: text(plot.levelLabel), showarrow: false, font: { size: 11, color: color("muted") }, bgcolor: color("surface"), opacity: 0.85, borderpad: 1 }];
  }
  /** Steps are whole: a short run must not get ticks between them. */
  function wholeSteps() {
    const last = Math.max(0, ...data.runs.map((run) => { const axis = axisOf(run); return axis && axis.length ? axis[axis.length - 1] : 0; }));
    return state.axis === "step" && last <= 8 ? { dtick: 1, tick0: 0 } : {};
  }

  function titleOf() {
    if (state.axis !== "time") return state.axis === "step" ? "step" : "tokens";
    return unit()[1] + (data.runs.some((run) => run.curves.estimatedTime) ? " (spread evenly over steps)" : "");
  }

  function made(plot) {
    const all = traces(plot), range = zoom.get(state.axis);
    const y = { hoverformat: ".4g", exponentformat: "power", nticks: 6, title: { text: text(plot.unit || ""), standoff: 4, font: { size: 11 } } };
    if (/^share/.test(plot.unit || "")) Object.assign(y, { tickformat: ".2~%", rangemode: "tozero" });
    return {
      traces: all,
      layout: {
        hovermode: all.length > 14 ? "closest" : "x unified", showlegend: all.filter((trace) => trace.showlegend !== false).length > 1 && data.runs.length === 1,
        xaxis: { title: { text: titleOf(), standoff: 6 }, ...(range ? { range, autorange: false } : {}), tickformat: state.axis === "time" ? "" : "~s", ...(range ? {} : wholeSteps()) }, yaxis: y, annotations: levelName(plot),
        yaxis2: { overlaying: "y", range: [0, 1], visible: false, fixedrange: true }, shapes: shapesOf(plot),
        margin: { l: 60, r: 12, t: 8, b: 44 },
      },
      zoomed,
    };
  }

  /** A range chosen in one plot holds for all, and brings back the points that were too many for the whole. */
  function zoomed(place, change) {
    if (change["xaxis.range[0]"] !== undefined) zoom.set(state.axis, [change["xaxis.range[0]"], change["xaxis.range[1]"]]);
    else if (change["xaxis.autorange"]) zoom.delete(state.axis);
    else return;
    redrawCurves();
  }
  const keys = () => data.plots.map((plot) => plot.key);
  const redrawCurves = () => preftune.redraw(preftune.drawn().filter((key) => keys().includes(key)));
  preftune.resetZoom = () => { zoom.clear(); redrawCurves(); };
  preftune.redrawCurves = redrawCurves;
  preftune.hasAxis = (name) => data.runs.some((run) => run.curves.axes[name]);
  preftune.thin = thin;
  preftune.registerCurves = () => data.plots.forEach((plot) => preftune.register(plot.key, () => made(plot)));
})();
