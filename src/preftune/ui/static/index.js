// The list of runs, which follows the folder.
"use strict";
(() => {
  const body = document.getElementById("list");
  const marked = new Set();
  document.getElementById("theme").addEventListener("click", () => {
    const root = document.documentElement;
    root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
  });
  const shown = (value) => value === null || value === undefined ? "–" : typeof value === "number" ? Number.isInteger(value) ? value.toLocaleString("en") : String(Number(value.toPrecision(4))) : value;
  const MOST = 12, limit = document.getElementById("limit");
  const view = (keys) => "view?" + keys.map((key) => "id=" + encodeURIComponent(key)).join("&");

  function cell(row, content, numeric) {
    const one = document.createElement("td");
    if (numeric) one.className = "num";
    one.append(content);
    row.append(one);
  }
  function show(entries) {
    const rows = entries.map((entry) => {
      const row = document.createElement("tr"), box = document.createElement("input"), link = document.createElement("a"), tag = document.createElement("span");
      box.type = "checkbox";
      box.checked = marked.has(entry.key);
      box.setAttribute("aria-label", "compare " + entry.label);
      box.addEventListener("change", () => { if (box.checked && marked.size >= MOST) { box.checked = false; limit.textContent = "At most " + MOST + " fit side by side."; return; }
        limit.textContent = "";
        if (box.checked) marked.add(entry.key); else marked.delete(entry.key);
      });
      link.href = view([entry.key]);
      link.textContent = entry.label;
      tag.className = "tag status";
      tag.dataset.status = entry.status;
      tag.textContent = entry.kind === "sweep" ? "sweep, " + entry.trials + " trials" : entry.status;
      const step = entry.max_steps ? shown(entry.step ?? 0) + " of " + shown(entry.max_steps) : shown(entry.step);
      [[box], [link], [tag], [step, 1], [shown(entry.loss), 1], [shown(entry.accuracy), 1], [shown(entry.alarms), 1]].forEach(([content, numeric]) => cell(row, content, numeric));
      return row;
    });
    body.replaceChildren(...rows);
    document.getElementById("empty").hidden = entries.length > 0;
  }
  document.getElementById("open").addEventListener("click", () => {
    if (marked.size) location.href = view([...marked]);
  });
  show(JSON.parse(document.getElementById("preftune-list").textContent));

  const connection = document.getElementById("connection");
  preftuneWatch("", connection, async () => {
    // Somebody who has the keyboard in the list keeps it: the list is changed once it is left.
    if (body.contains(document.activeElement)) await new Promise((done) => body.addEventListener("focusout", done, { once: true }));
    const answer = await fetch("list");
    if (answer.ok) show(await answer.json());
  });
  document.documentElement.dataset.ready = "true";
})();
