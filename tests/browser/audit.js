// What an accessibility checker would find: names, labels, ids, alternatives, contrast. A list of complaints.
(() => {
  const complaints = [];
  const dialog = document.querySelector("dialog[open]");
  const top = dialog ?? document.body;
  const visible = (node) => node.checkVisibility({ opacityProperty: true, visibilityProperty: true });
  const show = (node) => node.outerHTML.replaceAll(/\s+/g, " ").slice(0, 120);
  const complain = (what, node) => complaints.push(`${what}: ${show(node)}`);

  function nameOf(node) {
    const by = node.getAttribute("aria-labelledby");
    const labels = [...(node.labels ?? [])].map((label) => label.textContent);
    const pointed = by ? by.split(" ").map((id) => document.getElementById(id)?.textContent ?? "") : [];
    const alternatives = [...node.querySelectorAll("img[alt]")].map((img) => img.alt);
    const texts = [node.getAttribute("aria-label"), ...pointed, ...labels, node.matches("input, textarea, select") ? "" : node.textContent, ...alternatives];
    return texts.filter(Boolean).join(" ").trim();
  }

  const ids = [...document.querySelectorAll("[id]")].map((node) => node.id);
  for (const id of ids.filter((id, n) => ids.indexOf(id) !== n)) complaints.push(`id twice: ${id}`);
  for (const attribute of ["for", "aria-labelledby", "aria-describedby", "aria-controls"]) {
    for (const node of document.querySelectorAll(`[${attribute}]`)) {
      for (const id of node.getAttribute(attribute).split(" ")) if (!ids.includes(id)) complain(`${attribute} leads nowhere`, node);
    }
  }
  for (const node of top.querySelectorAll("button, a[href], input, select, textarea, summary, [role=tab], [role=slider]")) {
    if (visible(node) && !nameOf(node)) complain("no name", node);
  }
  for (const node of top.querySelectorAll("img")) if (!node.hasAttribute("alt")) complain("no alt", node);
  for (const node of top.querySelectorAll("fieldset")) if (!node.querySelector("legend")) complain("no legend", node);
  for (const node of top.querySelectorAll("section, dialog")) {
    if (!node.getAttribute("aria-labelledby") && !node.getAttribute("aria-label")) complain("no name", node);
  }
  if (!document.documentElement.lang) complaints.push("no language");
  if (document.querySelectorAll("h1").length !== 1) complaints.push("not one h1");
  const levels = [...document.querySelectorAll("h1, h2, h3")].filter((node) => node.closest("dialog") === null).map((node) => Number(node.tagName[1]));
  levels.forEach((level, n) => n && level > levels[n - 1] + 1 && complaints.push(`a heading of level ${level} after ${levels[n - 1]}`));

  // Colours as the canvas sees them: any notation in, four bytes out
  const pen = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  function colour(text) {
    pen.clearRect(0, 0, 1, 1);
    pen.fillStyle = text;
    pen.fillRect(0, 0, 1, 1);
    const [red, green, blue, alpha] = pen.getImageData(0, 0, 1, 1).data;
    return [red, green, blue, alpha / 255];
  }
  const over = ([r, g, b, a], below) => [r, g, b].map((value, n) => value * a + below[n] * (1 - a));
  function backgroundOf(node) {
    const layers = [];
    for (let at = node; at; at = at.parentElement) {
      const layer = colour(getComputedStyle(at).backgroundColor);
      layers.push(layer);
      if (layer[3] === 1) break;
    }
    return layers.reverse().reduce((below, layer) => over(layer, below), [255, 255, 255]);
  }
  function luminance(rgb) {
    const [r, g, b] = rgb.map((value) => value / 255).map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  }
  const walker = document.createTreeWalker(top, NodeFilter.SHOW_TEXT);
  for (let text = walker.nextNode(); text; text = walker.nextNode()) {
    const node = text.parentElement;
    if (!text.data.trim() || !visible(node) || node.closest("[disabled], .unseen, option, svg, noscript")) continue;
    const style = getComputedStyle(node);
    const below = backgroundOf(node);
    const [a, b] = [luminance(over(colour(style.color), below)), luminance(below)];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const large = parseFloat(style.fontSize) >= 24 || (parseFloat(style.fontSize) >= 18.66 && Number(style.fontWeight) >= 700);
    if (contrast < (large ? 3 : 4.5)) complain(`contrast ${contrast.toFixed(2)}`, node);
  }
  return complaints;
})();
