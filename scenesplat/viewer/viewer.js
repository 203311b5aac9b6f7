// The scene of the page: drawn by Spark, coloured by query, asked by clicks.
import * as THREE from "three";
import { OrbitControls } from "three/addons/controls/OrbitControls.js";
import { PackedSplats, SparkRenderer, SplatMesh, utils } from "spark";

const FOUND = [0.92, 0.25, 0.05];
const facts = JSON.parse(document.getElementById("facts").textContent);
const element = (id) => document.getElementById(id);
const count = facts.count;

// Columns of the scene ------------------------------------------------------------------------------------------------

const bytes = await new Response(await window.unpack(element("scene"))).arrayBuffer();
const column = {};
let place = 0;
for (const [name, kind, width] of facts.columns) {
  const size = kind === "uint16" ? 2 : 1;
  const Kind = size === 2 ? Uint16Array : Uint8Array;
  column[name] = Array.from({ length: width }, (_, i) => new Kind(bytes, place + i * size * count, count));
  place += width * size * count;
}
const centre = new Float32Array(3 * count), scale = new Float32Array(3 * count), turn = new Float32Array(4 * count);
const [least, largest] = facts.logScale;
// Drawn about the middle of the scene: splats are stored in half precision.
const middle = facts.low.map((low, axis) => low + facts.span[axis] / 2);
for (let i = 0; i < count; i++) {
  for (let axis = 0; axis < 3; axis++) {
    centre[3 * i + axis] = facts.low[axis] + (column.centre[axis][i] / 65535) * facts.span[axis] - middle[axis];
    scale[3 * i + axis] = Math.exp(least + (column.scale[axis][i] / 255) * (largest - least));
  }
  let length = 0;
  for (let k = 0; k < 4; k++) length += (turn[4 * i + k] = (column.quaternion[k][i] - 127) / 127) ** 2;
  for (let k = 0; k < 4; k++) turn[4 * i + k] /= Math.sqrt(length) || 1;
}

// The picture ---------------------------------------------------------------------------------------------------------

const canvas = element("view");
const renderer = new THREE.WebGLRenderer({ canvas, antialias: false, preserveDrawingBuffer: true });
renderer.setPixelRatio(Math.min(devicePixelRatio, 2));
const world = new THREE.Scene();
const camera = new THREE.PerspectiveCamera(55, 1, 0.02, 1000);
camera.up.set(0, 0, 1);
const spark = new SparkRenderer({ renderer });
world.add(spark);

const packedArray = new Uint32Array(4 * Math.ceil(count / 2048) * 2048);
for (let i = 0; i < count; i++) {
  const [w, x, y, z] = turn.subarray(4 * i, 4 * i + 4);
  utils.setPackedSplat(
    packedArray, i, centre[3 * i], centre[3 * i + 1], centre[3 * i + 2], scale[3 * i], scale[3 * i + 1], scale[3 * i + 2],
    x, y, z, w, column.opacity[0][i] / 255, column.rgb[0][i] / 255, column.rgb[1][i] / 255, column.rgb[2][i] / 255,
  );
}
const packedSplats = new PackedSplats({ packedArray, numSplats: count });
const mesh = new SplatMesh({ packedSplats });
await mesh.initialized;
world.add(mesh);
const mark = new THREE.Mesh(
  new THREE.SphereGeometry(1, 16, 12),
  new THREE.MeshBasicMaterial({ color: 0x1d4ed8, depthTest: false, transparent: true, opacity: 0.85 }),
);
mark.visible = false;
mark.renderOrder = 1;
world.add(mark);
const controls = new OrbitControls(camera, canvas);
controls.listenToKeyEvents(canvas);
controls.addEventListener("change", () => { state.moved += 1; });

const extent = facts.span;
function look(from) {
  const wide = Math.max(extent[0], extent[1]);
  if (from === "above") {
    camera.position.set(0, -0.001, -extent[2] / 2 + 0.95 * wide + Math.min(2.2, extent[2]));
    controls.target.set(0, 0, -extent[2] / 4);
    setCut(Math.min(1, Math.max(0.2, Math.min(2.2, 0.8 * extent[2]) / extent[2])));
  } else {
    camera.position.set(-0.75 * extent[0], -0.75 * extent[1], 0.5 * extent[2] + 0.35 * wide);
    controls.target.set(0, 0, -extent[2] / 4);
  }
  controls.update();
}

// Colours -------------------------------------------------------------------------------------------------------------

const state = { mode: "scene", threshold: facts.threshold, cut: 1, found: 0, frames: 0, moved: 0, picked: null, ready: false };

function paint() {
  const query = state.mode.startsWith("query ") ? Number(state.mode.slice(6)) : -1;
  const source = state.mode === "features" ? column.features : column.rgb;
  const scores = query < 0 ? null : column.scores[query];
  const highest = -facts.span[2] / 2 + state.cut * facts.span[2];
  const least = Math.round(state.threshold * 255);
  state.found = 0;
  for (let i = 0; i < count; i++) {
    let r = source[0][i], g = source[1][i], b = source[2][i];
    if (scores) {
      const grey = 255 * ((r + g + b) / 765 * 0.6 + 0.3);
      r = g = b = grey;
      if (scores[i] > least) {
        state.found += 1;
        const strength = 0.35 + 0.65 * Math.sqrt((scores[i] - least) / Math.max(1, 255 - least));
        r = (1 - strength) * grey + strength * 255 * FOUND[0];
        g = (1 - strength) * grey + strength * 255 * FOUND[1];
        b = (1 - strength) * grey + strength * 255 * FOUND[2];
      }
    }
    const shown = state.cut >= 1 || centre[3 * i + 2] <= highest ? column.opacity[0][i] : 0;
    packedArray[4 * i] = (Math.round(r) | (Math.round(g) << 8) | (Math.round(b) << 16) | (shown << 24)) >>> 0;
  }
  packedSplats.needsUpdate = true;
  mesh.updateVersion();
  element("threshold-row").hidden = query < 0;
  element("threshold-value").textContent = state.threshold.toFixed(2);
  element("cut-value").textContent = state.cut >= 1 ? "nothing hidden" : `${(state.cut * facts.span[2]).toFixed(2)} m`;
  if (scores) element("found").textContent = `${state.found.toLocaleString("en")} of ${count.toLocaleString("en")} Gaussians`;
}

function setMode(mode) {
  state.mode = mode;
  document.querySelectorAll("#modes input").forEach((input) => { input.checked = input.value === mode; });
  paint();
}

function setCut(value) {
  state.cut = value;
  element("cut").value = value;
  paint();
}

// Clicks --------------------------------------------------------------------------------------------------------------

// The Gaussian that gives most to the pixel: opacities along the ray, nearest first, as the picture itself adds up.
function pick(x, y) {
  const box = canvas.getBoundingClientRect();
  const ray = new THREE.Raycaster();
  ray.setFromCamera(new THREE.Vector2(((x - box.left) / box.width) * 2 - 1, 1 - ((y - box.top) / box.height) * 2), camera);
  const o = ray.ray.origin, d = ray.ray.direction, hits = [];
  const highest = state.cut >= 1 ? Infinity : -facts.span[2] / 2 + state.cut * facts.span[2];
  for (let i = 0; i < count; i++) {
    if (centre[3 * i + 2] > highest) continue;
    const px = o.x - centre[3 * i], py = o.y - centre[3 * i + 1], pz = o.z - centre[3 * i + 2];
    const along = -(px * d.x + py * d.y + pz * d.z);
    if (along <= camera.near) continue;
    const nx = px + along * d.x, ny = py + along * d.y, nz = pz + along * d.z;
    const reach = 3 * Math.max(scale[3 * i], scale[3 * i + 1], scale[3 * i + 2]);
    if (nx * nx + ny * ny + nz * nz > reach * reach) continue;
    const w = turn[4 * i], qx = turn[4 * i + 1], qy = turn[4 * i + 2], qz = turn[4 * i + 3];
    const own = (vx, vy, vz) => [  // a vector in the Gaussian's axes, in its standard deviations
      ((1 - 2 * (qy * qy + qz * qz)) * vx + 2 * (qx * qy + w * qz) * vy + 2 * (qx * qz - w * qy) * vz) / scale[3 * i],
      (2 * (qx * qy - w * qz) * vx + (1 - 2 * (qx * qx + qz * qz)) * vy + 2 * (qy * qz + w * qx) * vz) / scale[3 * i + 1],
      (2 * (qx * qz + w * qy) * vx + 2 * (qy * qz - w * qx) * vy + (1 - 2 * (qx * qx + qy * qy)) * vz) / scale[3 * i + 2],
    ];
    const p = own(px, py, pz), v = own(d.x, d.y, d.z);
    const vv = v[0] * v[0] + v[1] * v[1] + v[2] * v[2], pv = p[0] * v[0] + p[1] * v[1] + p[2] * v[2];
    const apart = p[0] * p[0] + p[1] * p[1] + p[2] * p[2] - (pv * pv) / vv;
    const alpha = (column.opacity[0][i] / 255) * Math.exp(-0.5 * Math.max(0, apart));
    if (alpha > 1 / 255) hits.push([along, alpha, i]);
  }
  hits.sort((a, b) => a[0] - b[0]);
  let light = 1, most = 0, best = -1;
  for (const [, alpha, i] of hits) {
    if (light * alpha > most) { most = light * alpha; best = i; }
    light *= 1 - alpha;
    if (light < 1e-4) break;
  }
  return best;
}

function line(word, score) {
  const item = document.createElement("li");
  item.style.setProperty("--share", `${(100 * score).toFixed(0)}%`);
  for (const text of [word, score.toFixed(2)]) item.append(Object.assign(document.createElement("span"), { textContent: text }));
  return item;
}

function show(i) {
  state.picked = null;
  mark.visible = i >= 0;
  element("picked").hidden = i < 0;
  if (i < 0) return;
  const words = column.words.map((numbers, k) => [facts.words[numbers[i]], column.word_scores[k][i] / 255]);
  const queries = facts.queries.map((query, k) => [query, column.scores[k][i] / 255]);
  const at = [0, 1, 2].map((axis) => centre[3 * i + axis] + middle[axis] + facts.origin[axis]);
  state.picked = { gaussian: i, words, queries, at };
  element("picked-title").textContent = words[0][0];
  element("picked-place").textContent = `at (${at.map((value) => value.toFixed(2)).join(", ")}) m`;
  element("picked-words").replaceChildren(...words.map(([word, score]) => line(word, score)));
  element("picked-queries").replaceChildren(...queries.map(([word, score]) => line(word, score)));
  mark.position.set(centre[3 * i], centre[3 * i + 1], centre[3 * i + 2]);
  mark.scale.setScalar(0.008 * camera.position.distanceTo(mark.position));
}

let pressed = null;
canvas.addEventListener("pointerdown", (event) => { pressed = [event.clientX, event.clientY, event.button]; });
canvas.addEventListener("pointerup", (event) => {
  if (!pressed || pressed[2] !== 0 || Math.hypot(event.clientX - pressed[0], event.clientY - pressed[1]) > 4) return;
  show(pick(event.clientX, event.clientY));
});

// The panel -----------------------------------------------------------------------------------------------------------

function choice(value, text, note = "") {
  const label = document.createElement("label");
  const input = Object.assign(document.createElement("input"), { type: "radio", name: "mode", value, checked: value === "scene" });
  input.addEventListener("change", () => setMode(value));
  label.append(input, Object.assign(document.createElement("span"), { textContent: text }));
  label.append(Object.assign(document.createElement("span"), { textContent: note }));
  return label;
}

element("title").textContent = facts.title;
const number = (value) => value.toLocaleString("en");
element("count").textContent = facts.count < facts.of
  ? `${number(facts.count)} of ${number(facts.of)} Gaussians are shown, each ${facts.grown} times as large: the scene was thinned`
  : `${number(facts.count)} Gaussians`;
element("negatives").textContent = facts.negatives.join(", ");
element("modes").append(choice("scene", "as it is"), choice("features", "directions of its features"));
facts.queries.forEach((query, k) => {
  const most = column.scores[k].reduce((a, b) => Math.max(a, b), 0) / 255;
  element("modes").append(choice(`query ${k}`, query, `up to ${most.toFixed(2)}`));
});
element("threshold").value = facts.threshold;
element("threshold").addEventListener("input", (event) => { state.threshold = Number(event.target.value); paint(); });
element("cut").addEventListener("input", (event) => setCut(Number(event.target.value)));
element("above").addEventListener("click", () => look("above"));
element("corner").addEventListener("click", () => look("corner"));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", backdrop);

function backdrop() {
  world.background = new THREE.Color(getComputedStyle(document.documentElement).getPropertyValue("--back").trim());
}

function size() {
  const { clientWidth, clientHeight } = canvas;
  renderer.setSize(clientWidth, clientHeight, false);
  camera.aspect = clientWidth / Math.max(1, clientHeight);
  camera.updateProjectionMatrix();
}

backdrop();
element("panel").hidden = false;
size();
new ResizeObserver(size).observe(canvas);
look("corner");
look("above");
element("status").textContent = "";
renderer.setAnimationLoop(() => {
  controls.update();
  renderer.render(world, camera);
  state.frames += 1;
  state.ready = state.frames > 2 && !spark.sorting && spark.activeSplats > 0;
});
window.viewer = { state, facts, pick, setMode, camera };
