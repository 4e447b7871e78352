"use strict";
// Galleries: order, filter, "show more", heat maps. Without this script the page shows all, in dataset order.
const FIRST = 24; // cards that are shown before "show more"

function orderOf(value) {
  const place = card => Number(card.dataset.place);
  // an image without a number comes last, whichever way it is sorted
  const number = (card, key, sign) => (key in card.dataset ? sign * Number(card.dataset[key]) : Infinity);
  const by = (key, sign) => (a, b) => {
    const [first, second] = [number(a, key, sign), number(b, key, sign)];
    return first === second ? place(a) - place(b) : first - second;
  };
  return {
    worst: by("cider", 1), best: by("cider", -1), dataset: by("place", 1), unsure: by("sure", 1), sure: by("sure", -1),
  }[value];
}

function setUp(gallery) {
  const list = gallery.querySelector(".cards");
  const cards = [...list.children];
  const filter = gallery.querySelector("input[type=search]");
  const count = gallery.querySelector(".count");
  const more = gallery.querySelector(".more");
  const texts = new Map(cards.map(card => [card, card.querySelector(".text").textContent.toLowerCase()]));
  let room = FIRST;

  function show() {
    const order = orderOf(gallery.querySelector("input[type=radio]:checked").value);
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = cards.filter(card => words.every(word => texts.get(card).includes(word))).sort(order);
    const shown = new Set(found.slice(0, room));
    for (const card of cards) card.hidden = !shown.has(card);
    list.append(...found);
    count.textContent = `${found.length} ${found.length === 1 ? "image" : "images"}`;
    more.hidden = found.length <= room;
    more.textContent = `Show more (${found.length - shown.size})`;
  }

  gallery.querySelector("fieldset").addEventListener("change", show);
  filter.addEventListener("input", () => { room = FIRST; show(); });
  more.addEventListener("click", () => {
    const last = [...list.children].filter(card => !card.hidden).at(-1);
    room += 2 * FIRST;
    show();
    last.nextElementSibling.scrollIntoView({ block: "nearest" });
  });
  list.addEventListener("click", event => {
    const button = event.target.closest("button[data-overlay]");
    if (button) look(button);
  });
  show();
}

// Lays the heat map of a word over its image, or takes it away again.
function look(button) {
  const card = button.closest(".card");
  const heat = card.querySelector(".heat");
  const on = button.getAttribute("aria-pressed") !== "true";
  for (const other of card.querySelectorAll("button[data-overlay]")) other.setAttribute("aria-pressed", "false");
  button.setAttribute("aria-pressed", String(on));
  heat.hidden = !on;
  if (on) {
    heat.src = button.dataset.overlay;
    heat.alt = `where the decoder looked for "${button.textContent}"`;
  }
}

document.querySelectorAll(".gallery").forEach(setUp);
