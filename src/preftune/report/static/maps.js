// A sweep's maps, interaction lines, distance, parallel coordinates and cost; and the plots of an evaluation.
(() => {
  const { data, color, runColor, text, short, shown, rounded } = preftune;

  const words = (name) => text(name.replace(/_/g, " "));
  const keyOf = (value) => JSON.stringify(value);
  const scale = (field) => (value) => field.log ? Math.log10(value) : field.numeric ? value : field.values.findIndex((other) => keyOf(other) === keyOf(value));
  const figure = (value, share) => share ? (100 * value).toFixed(1) : shown(value);
  /** A value and its interval in words. */
  function told(value, share) {
    const [mean, low, high] = rounded(value, share ? 100 : 1);
    return [mean + (share ? " %" : ""), low === undefined ? "" : low + " to " + high];
  }
  const estimate = (trial, metric) => trial.metrics[metric.name];

  function axisFor(field) {
    const at = scale(field), values = field.values.map(at);
    const few = field.values.length <= 9;
    return {
      title: { text: words(field.name) + (field.log ? " (log scale)" : ""), standoff: 8 },
      ...(few || !field.numeric ? { tickvals: values, ticktext: field.values.map((value) => short(shown(value), 14)) } : {}), showgrid: false,
    };
  }

  /** Edges between neighbouring values, half way on the axis' scale. */
  function edges(values) {
    if (values.length === 1) return [values[0] - 0.5, values[0] + 0.5];
    const inner = values.slice(1).map((value, i) => (value + values[i]) / 2);
    return [2 * values[0] - inner[0], ...inner, 2 * values[values.length - 1] - inner[inner.length - 1]];
  }

  function mix(low, high, share) {
    const parse = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
    const a = parse(low), b = parse(high);
    return a.map((part, i) => Math.round(part + (b[i] - part) * share));
  }
  function luminance(rgb) {
    const [r, g, b] = rgb.map((part) => { const c = part / 255; return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  }
  const inkOn = (share) => luminance(mix(color("map-low"), color("map-high"), share)) > 0.22 ? "#101418" : "#ffffff";
  const colorscale = () => [[0, color("map-low")], [1, color("map-high")]];

  /** The best trial of every cell: with a third field, a cell stands for several trials. */
  function cells(sweep, metric, fx, fy) {
    const found = new Map(), sign = metric.direction === "minimize" ? -1 : 1;
    for (const trial of sweep.trials) {
      const value = estimate(trial, metric);
      if (!value || trial.params[fx.name] === undefined || (fy && trial.params[fy.name] === undefined)) continue;
      const key = keyOf([trial.params[fx.name], fy ? trial.params[fy.name] : 0]);
      if (!found.has(key) || sign * value.mean > sign * found.get(key).value.mean) found.set(key, { trial, value });
    }
    return [...found.values()];
  }

  const hover = (trial, value, share) =>
    "trial " + text(trial.number) + "<br>" + Object.entries(trial.params).map(([name, v]) => words(name) + " " + short(shown(v))).join("<br>") +
    "<br><b>" + told(value, share)[0] + "</b>" + (value.low !== undefined ? " (" + told(value, share)[1] + ")" : "");

  function map(sweep, metric) {
    const [fx, fy] = sweep.fields;
    if (!fx || !fy) return line(sweep, metric);
    const found = cells(sweep, metric, fx, fy);
    const grid = fx.values.length * fy.values.length <= 100 && found.length >= 0.5 * fx.values.length * fy.values.length;
    return grid ? heatmap(sweep, metric, fx, fy, found) : cloud(sweep, metric, fx, fy, found);
  }

  function heatmap(sweep, metric, fx, fy, found) {
    const xs = fx.values.map(scale(fx)), ys = fy.values.map(scale(fy)), ex = edges(xs), ey = edges(ys);
    // Trials that have left the reference have no colour: their figures would use up the scale, and mean nothing.
    const stays = found.filter((cell) => !cell.trial.left), coloured = stays.length ? stays : found;
    const means = coloured.map((cell) => cell.value.mean), low = Math.min(...means), high = Math.max(...means);
    const share = (value) => high > low ? (value - low) / (high - low) : 0.5;
    const better = (value) => metric.direction === "minimize" ? 1 - share(value) : share(value);
    const z = ys.map(() => xs.map(() => null)), notes = ys.map(() => xs.map(() => "")), annotations = [], shapes = [];
    const hatch = { dark: [[], []], light: [[], []] }, gone = new Set();
    for (const { trial, value } of found) {
      const i = xs.indexOf(scale(fx)(trial.params[fx.name])), j = ys.indexOf(scale(fy)(trial.params[fy.name]));
      const [mean, ends] = told(value, metric.share), range = ends ? "<br><span>" + ends + "</span>" : "";
      if (trial.left && stays.length) {
        gone.add(j + "," + i);
        annotations.push({ x: (ex[i] + ex[i + 1]) / 2, y: (ey[j] + ey[j + 1]) / 2, text: mean + range + "<br>left reference", showarrow: false,
          hovertext: hover(trial, value, metric.share), font: { color: color("muted"), size: 12 } });
        continue;
      }
      z[j][i] = better(value.mean);
      notes[j][i] = hover(trial, value, metric.share);
      const ink = inkOn(z[j][i]);
      annotations.push({ x: (ex[i] + ex[i + 1]) / 2, y: (ey[j] + ey[j + 1]) / 2, text: "<b>" + mean + "</b>" + range, showarrow: false,
        font: { color: ink, size: 12 }, bgcolor: "rgb(" + mix(color("map-low"), color("map-high"), z[j][i]).join(",") + ")", borderpad: 2 });
      if (metric.tied.includes(trial.number)) hatchCell(hatch[ink === "#ffffff" ? "light" : "dark"], ex[i], ex[i + 1], ey[j], ey[j + 1]);
      if (trial.number === metric.best) {
        shapes.push({ type: "rect", x0: ex[i], x1: ex[i + 1], y0: ey[j], y1: ey[j + 1], line: { color: color("c1"), width: 4 } });
      }
    }
    z.forEach((row, j) => row.forEach((value, i) => {
      if (value === null && !gone.has(j + "," + i)) annotations.push({ x: (ex[i] + ex[i + 1]) / 2, y: (ey[j] + ey[j + 1]) / 2, text: "×", showarrow: false, font: { color: color("muted"), size: 18 } });
    }));
    const lines = ([x, y], stroke) => ({ x, y, type: "scatter", mode: "lines", line: { color: stroke, width: 1 }, opacity: 0.55, hoverinfo: "skip", showlegend: false });
    return {
      traces: [
        { type: "heatmap", x: ex, y: ey, z, text: notes, hovertemplate: "%{text}<extra></extra>", colorscale: colorscale(), zmin: 0, zmax: 1, showscale: false, xgap: 2, ygap: 2 },
        lines(hatch.dark, "#101418"), lines(hatch.light, "#ffffff"),
      ],
      layout: {
        xaxis: { ...axisFor(fx), range: [ex[0], ex[ex.length - 1]], fixedrange: true }, yaxis: { ...axisFor(fy), range: [ey[0], ey[ey.length - 1]], fixedrange: true },
        annotations, shapes, hovermode: "closest", margin: { l: 64, r: 12, t: 10, b: 52 },
      },
    };
  }

  /** Parallel diagonals over one cell. */
  function hatchCell([x, y], x0, x1, y0, y1) {
    const lines = 9;
    for (let k = 1; k < 2 * lines; k++) {
      const t = k / lines, a = Math.max(0, t - 1), b = Math.min(1, t);
      x.push(x0 + (x1 - x0) * a, x0 + (x1 - x0) * b, null);
      y.push(y0 + (y1 - y0) * (t - a), y0 + (y1 - y0) * (t - b), null);
    }
  }

  function cloud(sweep, metric, fx, fy, found) {
    const means = found.map((cell) => cell.value.mean), sign = metric.direction === "minimize" ? -1 : 1;
    const open = (cell) => metric.tied.includes(cell.trial.number);
    return {
      traces: [{
        type: "scatter", mode: "markers", x: found.map((cell) => scale(fx)(cell.trial.params[fx.name])), y: found.map((cell) => scale(fy)(cell.trial.params[fy.name])),
        text: found.map((cell) => hover(cell.trial, cell.value, metric.share)), hovertemplate: "%{text}<extra></extra>",
        marker: {
          size: found.map((cell) => cell.trial.number === metric.best ? 22 : 15), color: means.map((mean) => sign * mean), colorscale: colorscale(),
          symbol: found.map((cell) => cell.trial.number === metric.best ? "star" : open(cell) ? "diamond-x" : "circle"), line: { width: 1.5, color: color("ink") },
        },
      }],
      layout: { xaxis: scatterAxis(fx), yaxis: scatterAxis(fy), hovermode: "closest", margin: { l: 64, r: 12, t: 10, b: 52 } },
    };
  }
  const scatterAxis = (field) => ({ ...axisFor(field), ...(field.log && field.values.length > 9 ? { tickprefix: "10^" } : {}), showgrid: true });

  function errorBars(found, ink, unit) {
    const known = found.every((cell) => cell.value.low !== undefined);
    return known ? { type: "data", symmetric: false, array: found.map(({ value }) => (value.high - value.mean) * unit), arrayminus: found.map(({ value }) => (value.mean - value.low) * unit), color: ink, thickness: 1.2, width: 4 } : undefined;
  }

  function line(sweep, metric) {
    const [fx, fy] = sweep.fields, unit = metric.share ? 100 : 1;
    if (!fx) return cost(sweep);
    const found = cells(sweep, metric, fx, fy), at = scale(fx);
    const groups = fy ? fy.values : [null];
    const traces = groups.slice(0, 8).map((value, index) => {
      const own = found.filter((cell) => !fy || keyOf(cell.trial.params[fy.name]) === keyOf(value)).sort((a, b) => at(a.trial.params[fx.name]) - at(b.trial.params[fx.name]));
      return {
        type: "scatter", mode: "lines+markers", name: fy ? words(fy.name) + " " + short(shown(value), 14) : text(metric.title),
        x: own.map((cell) => at(cell.trial.params[fx.name])), y: own.map((cell) => cell.value.mean * unit), error_y: errorBars(own, runColor(index), unit),
        line: { color: runColor(index), width: 2, dash: ["solid", "dash", "dot", "dashdot"][index % 4] }, marker: { size: 8, symbol: ["circle", "square", "diamond", "triangle-up"][index % 4] },
        text: own.map((cell) => hover(cell.trial, cell.value, metric.share)), hovertemplate: "%{text}<extra></extra>",
      };
    });
    return { traces, layout: { xaxis: axisFor(fx), yaxis: { title: { text: text(metric.title) + (metric.share ? " (%)" : ""), standoff: 6 } }, showlegend: groups.length > 1, hovermode: "closest", margin: { l: 64, r: 12, t: 10, b: 52 } } };
  }

  function distance(sweep) {
    const metric = sweep.metrics[0], kl = sweep.kl, unit = metric.share ? 100 : 1;
    const found = sweep.trials.filter((trial) => estimate(trial, metric) && trial.metrics[kl]).map((trial) => ({ trial, value: estimate(trial, metric) }));
    return {
      traces: [{
        type: "scatter", mode: "markers", x: found.map(({ trial }) => Math.sqrt(Math.max(0, trial.metrics[kl].mean))), y: found.map(({ value }) => value.mean * unit), error_y: errorBars(found, color("muted"), unit),
        marker: { size: found.map(({ trial }) => trial.number === metric.best ? 15 : 9), symbol: found.map(({ trial }) => trial.number === metric.best ? "star" : metric.tied.includes(trial.number) ? "diamond" : "circle"), color: runColor(0), line: { width: 1, color: color("surface") } },
        text: found.map(({ trial, value }) => hover(trial, value, metric.share)), hovertemplate: "%{text}<extra></extra>", cliponaxis: false,
      }],
      layout: { xaxis: { title: { text: "√KL (√nats)", standoff: 6 }, rangemode: "tozero" }, yaxis: { title: { text: text(metric.title) + (metric.share ? " (%)" : ""), standoff: 6 } }, hovermode: "closest", margin: { l: 64, r: 12, t: 10, b: 52 } },
    };
  }

  /** Lines over upright axes. The library's own kind needs WebGL, which neither prints nor runs under this page's policy. */
  function parallel(sweep) {
    const metric = sweep.metrics[0];
    const columns = [...sweep.fields.map((field) => ({ label: words(field.name), of: (trial) => trial.params[field.name] === undefined ? null : scale(field)(trial.params[field.name]), ends: [field.values[0], field.values[field.values.length - 1]].map((v) => short(shown(v), 12)) }))];
    const means = sweep.trials.map((trial) => estimate(trial, metric)?.mean).filter((mean) => mean !== undefined);
    columns.push({ label: text(metric.title), of: (trial) => estimate(trial, metric)?.mean ?? null, ends: [Math.min(...means), Math.max(...means)].map((v) => figure(v, metric.share)) });
    const spans = columns.map((column) => { const values = sweep.trials.map(column.of).filter((value) => value !== null); return [Math.min(...values), Math.max(...values)]; });
    const at = (value, [low, high]) => value === null ? null : high > low ? (value - low) / (high - low) : 0.5;
    const ordered = [...sweep.trials].sort((a, b) => (a.number === metric.best) - (b.number === metric.best));
    const traces = ordered.filter((trial) => estimate(trial, metric)).map((trial) => {
      const best = trial.number === metric.best, tied = metric.tied.includes(trial.number);
      return {
        type: "scatter", mode: "lines", x: columns.map((_, i) => i), y: columns.map((column, i) => at(column.of(trial), spans[i])), text: columns.map(() => hover(trial, estimate(trial, metric), metric.share)),
        hovertemplate: "%{text}<extra></extra>", line: { color: best ? color("c1") : tied ? color("c0") : color("muted"), width: best ? 4 : tied ? 2 : 1, shape: "linear" }, opacity: best || tied ? 1 : 0.5, showlegend: false,
      };
    });
    const annotations = columns.flatMap((column, i) => [[column.ends[0], -0.07], [column.ends[1], 1.07]].map(([label, y]) => ({ x: i, y, text: label, showarrow: false, font: { color: color("ink"), size: 11 } })));
    return {
      traces,
      layout: {
        xaxis: { tickvals: columns.map((_, i) => i), ticktext: columns.map((column) => column.label), range: [-0.2, columns.length - 0.8], gridcolor: color("muted"), fixedrange: true },
        yaxis: { visible: false, range: [-0.14, 1.14], fixedrange: true }, annotations, hovermode: "closest", margin: { l: 12, r: 12, t: 10, b: 44 },
      },
    };
  }

  function cost(sweep) {
    const known = sweep.trials.filter((trial) => trial.seconds !== null);
    const done = (trial) => /complete|finished|ok/i.test(trial.state);
    return {
      traces: [{
        type: "bar", x: known.map((trial) => "trial " + text(trial.number)), y: known.map((trial) => trial.seconds), marker: { color: known.map((trial) => done(trial) ? runColor(0) : runColor(6)), pattern: { shape: known.map((trial) => done(trial) ? "" : "/") } },
        text: known.map((trial) => Object.entries(trial.params).map(([name, v]) => words(name) + " " + short(shown(v))).join("<br>") + "<br>" + text(trial.state.toLowerCase())), textposition: "none", hovertemplate: "%{y:.3g} s<br>%{text}<extra></extra>",
      }],
      layout: { yaxis: { title: { text: "seconds", standoff: 6 }, rangemode: "tozero" }, xaxis: { type: "category" }, hovermode: "closest", margin: { l: 56, r: 12, t: 10, b: 56 } },
    };
  }

  preftune.registerMaps = () => data.sweeps.forEach((sweep, index) => {
    sweep.metrics.forEach((metric, at) => preftune.register("map-" + index + "-" + at, () => map(sweep, metric)));
    if (sweep.metrics.length) {
      preftune.register("lines-" + index, () => line(sweep, sweep.metrics[0]));
      if (sweep.kl) preftune.register("kl-" + index, () => distance(sweep));
      preftune.register("parallel-" + index, () => parallel(sweep));
    }
    preftune.register("cost-" + index, () => cost(sweep));
  });

  // ---- evaluation ----------------------------------------------------------------------------------------------------

  /** The first key of an object that is there, as a number; estimates count by their mean. */
  function value(entry, ...names) {
    for (const name of names) {
      const found = entry[name];
      if (typeof found === "number") return { mean: found };
      if (found && typeof found.mean === "number") return found;
    }
    return null;
  }

  function calibration(bins) {
    const points = bins.map((bin) => ({ x: value(bin, "predicted", "confidence", "mean_predicted", "probability"), y: value(bin, "observed", "accuracy", "frequency", "share") })).filter((point) => point.x && point.y);
    const bars = points.some((point) => typeof point.y.low === "number"), arm = (y, end) => typeof y[end] === "number" ? Math.abs(y[end] - y.mean) : 0;
    // Confidence in the likelier answer begins at one half.
    const start = points.every((point) => point.x.mean >= 0.5) ? 0.5 : 0;
    return {
      traces: [
        { type: "scatter", mode: "lines", x: [start, 1], y: [start, 1], line: { color: color("muted"), dash: "dash", width: 1 }, hoverinfo: "skip", name: "perfect" },
        { type: "scatter", mode: "lines+markers", x: points.map((p) => p.x.mean), y: points.map((p) => p.y.mean), line: { color: runColor(0), width: 2 }, marker: { size: 8 }, name: "observed",
          error_y: bars ? { type: "data", symmetric: false, array: points.map((p) => arm(p.y, "high")), arrayminus: points.map((p) => arm(p.y, "low")), color: runColor(0), thickness: 1.2 } : undefined, hovertemplate: "predicted %{x:.3f}, observed %{y:.3f}<extra></extra>" },
      ],
      layout: { xaxis: { title: { text: "predicted", standoff: 6 }, range: [start - 0.02, 1.02] }, yaxis: { title: { text: "observed", standoff: 6 }, range: [Math.min(start, ...points.map((p) => p.y.low ?? p.y.mean)) - 0.02, 1.02] }, hovermode: "closest" },
    };
  }

  function byLength(rows) {
    const label = (row) => row.bucket ?? row.label ?? row.name ?? row.group ?? (row.from !== undefined ? row.from + "–" + (row.to ?? "") : row.low !== undefined && row.high !== undefined ? row.low + "–" + row.high : "");
    const found = rows.map((row) => ({ name: String(label(row)), value: value(row, "accuracy", "metric", "share") ?? value(row, "mean") })).filter((row) => row.value);
    const bars = found.some((row) => typeof row.value.low === "number"), arm = (row, end) => typeof row.value[end] === "number" ? Math.abs(row.value[end] - row.value.mean) : 0;
    return {
      traces: [{ type: "scatter", mode: "markers", x: found.map((row) => short(row.name, 18)), y: found.map((row) => row.value.mean), marker: { size: 10, color: runColor(0) },
        error_y: bars ? { type: "data", symmetric: false, array: found.map((row) => arm(row, "high")), arrayminus: found.map((row) => arm(row, "low")), color: runColor(0), thickness: 1.5 } : undefined, hovertemplate: "%{x}: %{y:.1%}<extra></extra>" }],
      layout: { xaxis: { type: "category" }, yaxis: { tickformat: ".2~%", title: { text: "accuracy", standoff: 6 } }, shapes: [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: 0.5, y1: 0.5, line: { color: color("muted"), width: 1, dash: "dash" } }], hovermode: "closest" },
    };
  }

  preftune.registerEvals = () => data.evals.forEach((one) => {
    if (one.bins.length) preftune.register("calibration-" + one.run, () => calibration(one.bins));
    if (one.byLength.length) preftune.register("bylength-" + one.run, () => byLength(one.byLength));
  });
})();
