// Starting a run: its plan, its start, and what it prints.
"use strict";
(() => {
  const at = (id) => document.getElementById(id);
  const form = at("launch-form"), status = at("launch-status"), shown = at("launch-text");
  const buttons = [at("launch-plan"), at("launch-start")];
  function asked() {
    const fields = new FormData(form), settings = {};
    for (const [name, value] of fields) if (name.startsWith("set-") && value) settings[name.slice(4)] = value;
    return { data: fields.get("data"), model: fields.get("model"), name: fields.get("name"), settings };
  }
  async function ask(path, content) {
    const answer = await fetch(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(content) });
    const said = await answer.json();
    if (!answer.ok) throw new Error(said.error);
    return said;
  }
  const tell = (text) => { shown.textContent = text; shown.hidden = !text; };
  async function busy(text, work) {
    status.textContent = text;
    buttons.forEach((one) => { one.disabled = true; });
    try { await work(); } catch (error) { status.textContent = error.message; }
    buttons.forEach((one) => { one.disabled = false; });
  }
  async function follow(name) {
    for (;;) {
      let said;
      try { said = await ask("launched", { name }); } catch (error) { status.textContent = error.message; return; }
      tell(said.text);
      if (!said.running) { status.textContent = said.code === 0 ? name + " is done." : name + " ended with code " + said.code + "."; return; }
      await new Promise((done) => setTimeout(done, document.hidden ? 10000 : 2000));
    }
  }
  at("launch-plan").addEventListener("click", () => busy("making the plan …", async () => {
    const said = await ask("plan", asked());
    tell(said.text);
    status.textContent = said.code === 0 ? "This is what it would do." : "It cannot be started like this.";
  }));
  at("launch-start").addEventListener("click", () => busy("starting …", async () => {
    const content = asked();
    status.textContent = (await ask("launch", content)).done + ".";
    follow(content.name);
  }));
})();
