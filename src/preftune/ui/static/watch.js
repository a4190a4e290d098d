// Asks whether there is something new. Hidden tabs ask rarely, and none holds a connection open.
"use strict";
const preftuneWatch = (query, connection, change) => {
  let last, timer, asking = false, lost = true;
  async function look() {
    if (asking) return;
    asking = true;
    clearTimeout(timer);
    try {
      const answer = await fetch("changes" + query);
      if (!answer.ok) throw new Error(answer.statusText);
      const { now } = await answer.json();
      // Once: what the page says about its runs since then stays.
      if (lost) connection.textContent = "connected";
      lost = false;
      if (now !== last) change();
      last = now;
    } catch { lost = true; connection.textContent = "connection lost, trying again"; }
    asking = false;
    timer = setTimeout(look, document.hidden ? 10000 : 1000);
  }
  document.addEventListener("visibilitychange", () => { if (!document.hidden) look(); });
  look();
};
