"use strict";
(() => {
  const codes = { {% for (target, method), code in layers.items() %}"{{ target }} {{ method }}": "{{ code }}", {% endfor %} };

  const apply = (card) => {
    const text = card.querySelector(".text");
    if (!text) return;
    const pick = (group) => (card.querySelector(`input[data-group="${group}"]:checked`) || {}).value;
    text.dataset.show = codes[`${pick("target")} ${pick("method")}`] || "";
    text.classList.toggle("outlined", card.querySelector('input[data-group="cited"]').checked);
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

  const light = (card, ids, on) => {
    for (const node of card.querySelectorAll("[data-cites]")) {
      if (!on) node.classList.remove("lit");
      else if (node.dataset.cites.split(" ").some((id) => ids.includes(id))) node.classList.add("lit");
    }
  };
  const hover = (on) => (event) => {
    const node = event.target instanceof Element && event.target.closest("[data-cites]");
    if (!node) return;
    const card = node.closest(".post-card");
    light(card, node.dataset.cites.split(" "), on);
    if (on && event.type === "focusin") {
      const source = card.querySelector(`.text.source [data-cites~="${node.dataset.cites}"]`);
      if (source && source !== node) source.scrollIntoView({ block: "nearest" });
    }
  };
  for (const [type, on] of [["mouseover", true], ["mouseout", false], ["focusin", true], ["focusout", false]]) {
    document.addEventListener(type, hover(on));
  }

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
