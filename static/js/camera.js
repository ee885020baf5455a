// One photo from this device's camera, or a sentence that says why there is none.
const gettext = (text) => (window.gettext ? window.gettext(text) : text);

const dialog = document.getElementById("camera");
const video = document.getElementById("camera-video");
const shutter = document.getElementById("camera-shoot");
const flip = document.getElementById("camera-flip");
const problem = document.getElementById("camera-problem");

let stream = null;
let facing = "environment";
let onShot = null;

/** Open the camera under a title; `onPhoto(file)` is called with each photo taken. `keepOpen` lets it take several. */
export async function openCamera(title, onPhoto, { keepOpen = false } = {}) {
  document.getElementById("camera-title").textContent = title;
  onShot = async (file) => {
    if (!keepOpen) dialog.close();
    onPhoto(file);
  };
  if (!dialog.open) dialog.showModal();
  await start();
}

async function start() {
  stop();
  problem.hidden = true;
  video.hidden = false;
  shutter.disabled = true;
  try {
    if (!navigator.mediaDevices?.getUserMedia) throw new DOMException("", window.isSecureContext ? "NotFoundError" : "SecurityError");
    const wanted = { video: { facingMode: { ideal: facing }, width: { ideal: 1920 }, height: { ideal: 1440 } }, audio: false };
    const found = await navigator.mediaDevices.getUserMedia(wanted);
    if (!dialog.open) return found.getTracks().forEach((track) => track.stop());
    stream = found;
    video.srcObject = stream;
    await video.play();
    shutter.disabled = false;
    shutter.focus();
    const cameras = (await navigator.mediaDevices.enumerateDevices()).filter((device) => device.kind === "videoinput");
    flip.hidden = cameras.length < 2;
  } catch (error) {
    explain(error);
  }
}

function stop() {
  stream?.getTracks().forEach((track) => track.stop());
  stream = null;
  video.srcObject = null;
}

function explain(error) {
  const sentences = {
    NotAllowedError: gettext("The browser was not allowed to use the camera. Allow it for this page (beside the address), then try again."),
    NotFoundError: gettext("No camera was found on this device. Choose photos instead."),
    NotReadableError: gettext("Another program is using the camera. Close it there, then try again."),
    SecurityError: gettext("The camera works only over https or on this machine itself. Open the https address, or choose photos instead."),
  };
  if (!dialog.open) return;
  stop();
  video.hidden = true;
  problem.hidden = false;
  problem.querySelector("p").textContent = sentences[error.name] ?? gettext("The camera could not be started. Choose photos instead.");
}

async function shoot() {
  if (!stream) return;
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
  canvas.getContext("2d").drawImage(video, 0, 0);
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.92));
  if (!blob) return;
  const when = new Date().toISOString().slice(0, 19).replaceAll(":", "-").replace("T", " ");
  await onShot(new File([blob], `Camera ${when}.jpg`, { type: "image/jpeg" }));
}

shutter.addEventListener("click", shoot);
flip.addEventListener("click", () => {
  facing = facing === "environment" ? "user" : "environment";
  start();
});
dialog.addEventListener("close", stop);
