// Copying a cell and changing the theme leave the focus nowhere; give it back to the button.
const buttons = "button.copybtn, button.theme-switch-button";

document.addEventListener("click", (event) => {
  const button = event.target.closest?.(buttons);
  if (!button) return;
  // The copy button puts its text into a field for a moment, and drops that when it has it.
  for (const wait of [0, 100, 400])
    setTimeout(() => {
      if (document.activeElement === document.body) button.focus({ preventScroll: true });
    }, wait);
});
