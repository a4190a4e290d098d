// Follows runs, and asks for a stop, a checkpoint, an answer, or rows of data.
(() => {
  const ids = new URLSearchParams(location.search).getAll("id");
  const query = ids.map((id) => "id=" + encodeURIComponent(id)).join("&");
  const at = (id) => document.getElementById(id);
  const known = JSON.stringify(preftune.data.sections);

  function setStatus(entries) {
    for (const item of document.querySelectorAll("[data-entry]")) {
      const entry = entries.find((one) => one.key === item.dataset.entry);
      const status = entry ? entry.status : "gone", tag = item.querySelector(".status");
      tag.textContent = status;
      tag.dataset.status = status;
      const gone = status === "gone";
      for (const button of item.querySelectorAll("button")) button.disabled = gone || (status === "running") === ("idle" in button.dataset);
    }
  }
  let busy = false, again = false;
  async function refresh() {
    if (busy) { again = true; return; }
    busy = true;
    const began = performance.now();
    try {
      const answer = await fetch("news?" + query);
      if (answer.status === 404) { setStatus([]); at("connection").textContent = "the folder has vanished; what was read stays on the page"; return; }
      if (!answer.ok) return;
      const news = await answer.json();
      Object.assign(preftune.data, news.data);
      preftune.registerMaps();
      preftune.redraw();
      if (at("summary").contains(document.activeElement) === false) {
        const parsed = new DOMParser().parseFromString(news.summary, "text/html").getElementById("summary");
        if (parsed) at("summary").replaceWith(document.adoptNode(parsed));
      }
      setStatus(news.status);
      at("connection").textContent = "connected";
      at("newer").hidden = JSON.stringify(news.sections) === known;
      document.documentElement.dataset.refreshed = String(Number(document.documentElement.dataset.refreshed || 0) + 1);
    } catch { at("connection").textContent = "connection lost, trying again"; } finally {
      // A long log takes a while to read: the page follows it at most a quarter of the time.
      setTimeout(() => { busy = false; if (again) { again = false; refresh(); } }, Math.min(60000, 3 * (performance.now() - began)));
    }
  }
  preftuneWatch("?" + query, at("connection"), refresh);
  at("reload").addEventListener("click", () => location.reload());

  async function ask(path, content) {
    const answer = await fetch(path, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(content) });
    const said = await answer.json();
    if (!answer.ok) throw new Error(said.error);
    return said;
  }
  for (const button of document.querySelectorAll("[data-act]")) {
    button.addEventListener("click", async () => {
      const action = button.dataset.act, id = button.closest("[data-entry]").dataset.entry;
      if (action === "stop" && !confirm("Stop this run after its current step? It saves a checkpoint first.")) return;
      try {
        const said = await ask("act", { id, action });
        at("outcome").textContent = said.done;
        if (said.follow) follow(said.follow);
      } catch (error) { at("outcome").textContent = error.message; }
    });
  }
  async function follow(name) {
    const shown = at("work-text");
    for (;;) {
      let said;
      try { said = await ask("launched", { name }); } catch (error) { at("outcome").textContent = error.message; return; }
      shown.textContent = said.text;
      shown.hidden = !said.text;
      if (!said.running) { at("outcome").textContent = name + (said.code === 0 ? " is done" : " ended with code " + said.code); return; }
      await new Promise((done) => setTimeout(done, document.hidden ? 10000 : 2000));
    }
  }

  function part(tag, text, name) {
    const one = document.createElement(tag);
    if (name) one.className = name;
    if (text !== undefined) one.textContent = text;
    return one;
  }
  at("prompt-form")?.addEventListener("submit", async (event) => {
    event.preventDefault();
    const form = new FormData(event.target), status = at("prompt-status");
    const content = { id: ids[0], prompt: form.get("prompt") };
    for (const name of ["max_new_tokens", "temperature", "seed"]) content[name] = Number(form.get(name));
    status.textContent = "answering …";
    try {
      const said = await ask("prompt", content);
      at("answers").replaceChildren(...said.answers.map((answer) => {
        const box = part("div");
        box.append(part("h3", answer.label === "before" ? "Before" : "After"), part("p", answer.text, "text"),
          part("p", answer.num_tokens + " tokens" + (answer.ended ? "" : ", cut off at the limit"), "muted"));
        return box;
      }));
      status.textContent = said.note || "";
    } catch (error) { status.textContent = error.message; }
  });

  // What is to become likelier, what less likely.
  const tones = { desirable: "chosen", "trained on": "chosen", undesirable: "rejected" };
  const tone = (label) => tones[label] || label;
  async function showRows(start) {
    const status = at("rows-status");
    status.textContent = "loading …";
    const answer = await fetch("data?" + query + "&start=" + start), said = await answer.json();
    if (!answer.ok) { status.textContent = said.error; return; }
    status.textContent = said.total + " rows; showing " + said.start + " to " + (said.start + said.rows.length - 1);
    at("rows-legend").replaceChildren(...said.legend.flatMap((one) => [part("span", one.text, "tok " + tone(one.label)), " "]), said.remark ? "(" + said.remark + ")" : "");
    at("rows-form").elements.start.value = said.start;
    at("rows-next").dataset.next = said.start + said.rows.length < said.total ? said.start + said.rows.length : 0;
    at("rows-list").replaceChildren(...said.rows.map((row) => {
      const card = part("div", undefined, "row-card");
      card.append(part("h3", "Row " + row.index));
      if (row.problem) card.append(part("p", row.problem, "muted"));
      for (const side of row.sides) {
        const text = part("p", undefined, "text");
        for (const run of side.runs) {
          const token = part("span", run.text, "tok " + tone(run.label));
          token.title = run.label + ", " + run.num_tokens + " tokens";
          text.append(token);
        }
        card.append(part("p", side.name + ", " + side.num_tokens + " tokens", "label"), text);
      }
      return card;
    }));
  }
  at("rows-form")?.addEventListener("submit", (event) => { event.preventDefault(); showRows(Number(new FormData(event.target).get("start"))); });
  at("rows-next")?.addEventListener("click", (event) => showRows(Number(event.target.dataset.next || 0)));
})();
