// The layout elements of a page: [class, x, y, width, height] in CSS pixels of the whole page.
const WHOLE = "ul, ol, dl, table, pre, figure, nav, img, svg, h1, h2, h3, h4, h5, h6, p";
const NAVIGATION = "nav, [role=navigation], .related, .sphinxsidebar, .navheader, .navfooter, .toc, .contents";
const tall = arguments[0];
const found = [];

function kind(element) {
  const name = element.localName;
  if (element.matches(NAVIGATION)) return "navigation";
  if (/^h[1-6]$/.test(name)) return "heading";
  return { p: "paragraph", ul: "list", ol: "list", dl: "list", table: "table", pre: "code",
           figure: "figure", img: "figure", svg: "figure" }[name];
}

// A list or a table around whole sections is layout: what is inside counts.
function isLayout(element, name, box) {
  const blocks = { list: "h1, h2, h3, h4, h5, h6, table, pre, dl", table: "h1, h2, h3, h4, h5, h6, table, pre, p + p" }[name];
  return blocks && (box.height > tall || element.querySelector(blocks));
}

function visit(element) {
  const style = getComputedStyle(element);
  if (style.display === "none" || style.visibility === "hidden" || style.position === "fixed") return;
  const box = element.getBoundingClientRect();
  const name = kind(element);
  if (name && box.width >= 12 && box.height >= 8 && !isLayout(element, name, box)) {
    const empty = name !== "figure" && !element.innerText.trim();
    if (!empty) found.push([name, box.x + scrollX, box.y + scrollY, box.width, box.height]);
    return;
  }
  for (const child of element.children) visit(child);
}

visit(document.body);
return { boxes: found, height: document.documentElement.scrollHeight };
