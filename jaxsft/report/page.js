// Switches between the curves that stand in the page; the page says the same without it.
"use strict";

for (const controls of document.querySelectorAll(".controls")) controls.hidden = false;
for (const button of document.querySelectorAll("button[data-name]")) {
  button.onclick = () => {
    document.body.dataset[button.dataset.name] = button.dataset.value;
    for (const other of button.parentElement.children) other.setAttribute("aria-pressed", String(other === button));
  };
}
