"use strict";
(() => {
  const codes = { {% for (target, method), code in layers.items() %}"{{ target }} {{ method }}": "{{ code }}", {% endfor %} };

  const apply = (card) => {
    const text = card.querySelector(".text.source");
    const pick = (group) => (card.querySelector(`input[data-group="${group}"]:checked`) || {}).value;
    text.dataset.show = codes[`${pick("target")} ${pick("method")}`] || "";
    const outline = card.querySelector('input[data-group="cited"]');
    text.classList.toggle("outlined", !outline || outline.checked);
  };

  const copyToAll = (input) => {
    for (const card of document.querySelectorAll(".post-card")) {
      for (const other of card.querySelectorAll(`input[data-group="${input.dataset.group}"]`)) {
        if (other.type === "checkbox") other.checked = input.checked;
        else if (other.value === input.value) other.checked = true;
      }
      apply(card);
    }
  };

  document.addEventListener("change", (event) => {
    const input = event.target.closest("input[data-group]");
    if (!input) return;
    const card = input.closest(".post-card");
    if (card) apply(card); else copyToAll(input);
  });

  // A cited phrase lights its source, and the post shows what that phrase alone was written from.
  const light = (card, ids, on) => {
    for (const node of card.querySelectorAll("[data-cites], [data-lost]")) {
      const own = (node.dataset.cites || node.dataset.lost).split(" ");
      node.classList.toggle("lit", on && own.some((id) => ids.includes(id)));
    }
    const text = card.querySelector(".text.source");
    let known = false;
    for (const node of text.querySelectorAll("[data-phrase]")) {
      const found = on && node.dataset.phrase.split(" ").map((part) => part.split(":")).find(([id]) => id === ids[0]);
      if (found) node.dataset.now = found[1]; else delete node.dataset.now;
      known = known || Boolean(found);
    }
    if (known) text.dataset.show = "phrase"; else apply(card);
  };
  const hover = (on) => (event) => {
    const node = event.target instanceof Element && event.target.closest("[data-cites], [data-lost]");
    if (!node) return;
    const card = node.closest(".post-card");
    light(card, (node.dataset.cites || node.dataset.lost).split(" "), on);
    const hint = card.querySelector(".hint");
    if (hint) hint.textContent = !on ? hint.dataset.rest : node.dataset.cites ? hint.dataset.lit : hint.dataset.lost;
    if (on && event.type === "focusin" && node.dataset.cites) {
      const source = card.querySelector(`.text.source [data-cites~="${node.dataset.cites}"]`);
      if (source && source !== node) source.scrollIntoView({ block: "nearest" });
    }
  };
  for (const [type, on] of [["mouseover", true], ["mouseout", false], ["focusin", true], ["focusout", false]]) {
    document.addEventListener(type, hover(on));
  }

  // Paper cannot be unfolded.
  let folded = [];
  window.addEventListener("beforeprint", () => {
    folded = [...document.querySelectorAll("details:not([open])")];
    for (const node of folded) node.open = true;
  });
  window.addEventListener("afterprint", () => {
    for (const node of folded) node.open = false;
  });

  for (const table of document.querySelectorAll("table.sortable")) {
    table.addEventListener("click", (event) => {
      const button = event.target.closest("th button");
      if (!button) return;
      const head = button.closest("th");
      const column = head.cellIndex;
      const down = head.getAttribute("aria-sort") !== "descending";
      for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const body = table.tBodies[0];
      const value = (row) => row.cells[column].dataset.v;
      const compare = (a, b) => {
        if (a === "" || b === "") return (a === "") - (b === "");
        const gap = Number.isNaN(Number(a)) || Number.isNaN(Number(b)) ? a.localeCompare(b) : Number(a) - Number(b);
        return down ? -gap : gap;
      };
      body.append(...[...body.rows].sort((x, y) => compare(value(x), value(y))));
    });
  }
})();
