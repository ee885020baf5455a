// Which label photos become examples of: a label set, and one of its labels or a new one.
import { element, request } from "./app.js";

const NEW_LABEL = "new";

const gettext = (text) => (window.gettext ? window.gettext(text) : text);

/**
 * The fields of labelsets/_label_choice.html, made alive. `propose()` names a new label as long as nobody has.
 *
 * `chosen()` answers {id, addUrl, intakeUrl} of the label, made first if it is new: `addUrl` takes photos that are here
 * already, `intakeUrl` begins an upload. `proposeName()` is called when the fields come into sight.
 */
export function labelChoice(propose = () => "") {
  const { sets, noId, addUrl, intakeUrl } = JSON.parse(document.getElementById("labels-by-set").textContent);
  const set = document.getElementById("examples-set");
  const label = document.getElementById("examples-label");
  const name = document.getElementById("examples-name");

  function listLabels(selected = null) {
    const options = sets[set.value].labels.map((one) => element("option", { value: one.id }, one.name));
    label.replaceChildren(...options, element("option", { value: NEW_LABEL }, gettext("A new label…")));
    if (selected) label.value = selected;
    showName();
  }

  function showName() {
    document.getElementById("examples-new").hidden = label.value !== NEW_LABEL;
    if (label.value === NEW_LABEL && !name.value) name.value = propose();
  }

  async function chosen() {
    if (label.value === NEW_LABEL) {
      const made = await request(sets[set.value].newLabelUrl, { method: "POST", body: new URLSearchParams({ name: name.value }) });
      sets[set.value].labels.push({ id: made.label, name: name.value.trim() });
      name.value = "";
      listLabels(made.label);
    }
    return { id: label.value, addUrl: addUrl.replace(noId, label.value), intakeUrl: intakeUrl.replace(noId, label.value) };
  }

  set.addEventListener("change", () => listLabels());
  label.addEventListener("change", showName);
  listLabels();
  return { chosen, proposeName: showName };
}
