// Names and roles that gradio leaves out, and the focus: it goes to the box when what had it vanishes or is disabled.
() => {
  const all = (selector) => document.querySelectorAll(selector);
  const box = () => document.querySelector("#say textarea");
  let focused = null;
  const mend = () => {
    for (const said of all("#chat [data-testid=user], #chat [data-testid=bot]")) said.setAttribute("role", "group");
    for (const button of all("#say .submit-button")) button.setAttribute("aria-label", "Send");
    for (const button of all("#say .stop-button")) button.setAttribute("aria-label", "Stop");
    for (const region of all("#status, #goal")) region.setAttribute("role", "status");
    const lost = focused && (!focused.isConnected || focused.disabled);
    if (lost && [document.body, focused].includes(document.activeElement)) box()?.focus();
  };
  document.addEventListener("focusin", (event) => { focused = event.target; });
  document.addEventListener("click", (event) => { if (event.target.closest("#reset")) box()?.focus(); });
  new MutationObserver(mend).observe(document.body, { childList: true, subtree: true, attributeFilter: ["disabled"] });
  mend();
}
