const shown = new Map();
async function update() {
  const answer = await fetch(location.href, {cache: "no-store"});
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  for (const part of page.querySelectorAll("main > section")) {
    const now = document.getElementById(part.id);
    if (shown.has(part.id) ? shown.get(part.id) !== part.outerHTML : now.outerHTML !== part.outerHTML) {
      const open = [...now.querySelectorAll("details")].map((one) => one.open);
      part.querySelectorAll("details").forEach((one, n) => { one.open = open[n]; });
      now.replaceWith(document.importNode(part, true));
    }
    shown.set(part.id, part.outerHTML);
  }
}
setInterval(() => update().catch(() => {}), 3000);
