// Formulas and outputs that are wider than the screen scroll; let the keyboard reach those too.
const wide = ".bd-article :is(mjx-container[display], div.math, .output, .pst-scrollable-table-container)";

function update() {
  for (const box of document.querySelectorAll(wide)) {
    const scrolls =
      box.scrollWidth > box.clientWidth + 1 && getComputedStyle(box).overflowX !== "visible";
    if (scrolls) box.tabIndex = 0;
    else if (box.tabIndex === 0) box.removeAttribute("tabindex");
  }
}

await window.MathJax?.startup?.promise;
update();
addEventListener("resize", update);
