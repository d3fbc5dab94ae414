/* A box above a list shows those entries that have every word. */
for (const list of document.querySelectorAll(".find")) {
  const box = document.createElement("input"), entries = [...list.querySelectorAll("li")];
  const texts = entries.map((entry) => entry.textContent.toLowerCase());
  const show = () => {
    const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
    entries.forEach((entry, i) => (entry.hidden = !words.every((word) => texts[i].includes(word))));
  };
  box.type = "search";
  box.placeholder = "Search names, lessons, parameters and options";
  box.setAttribute("aria-label", "Search");
  box.value = decodeURIComponent(location.hash.slice(1));
  box.addEventListener("input", show);
  list.before(box);
  box.focus();
  show();
}
