// What is seen of a page, and what is done with it: drawing, pins, elements and controls.
const REGION = 0.6; // of a region's similarity where the mask is off
const VIEWS = { large: 'Enlarge', original: 'Original' };
const PINS = [[23, 105, 210], [194, 65, 45], [31, 138, 91], [217, 178, 95], [171, 139, 234], [76, 195, 214], [238, 124, 184]];
const ANCHORS = [[0, 0, 4], [31, 12, 72], [85, 15, 109], [136, 34, 106], [186, 54, 85], [227, 89, 51], [249, 140, 10], [249, 201, 50], [252, 255, 164]];
const RAMP = Array.from({ length: 256 }, (_, index) => {
  const at = (index / 255) * (ANCHORS.length - 1), left = Math.min(Math.floor(at), ANCHORS.length - 2);
  return ANCHORS[left].map((from, c) => Math.round(from + (at - left) * (ANCHORS[left + 1][c] - from)));
});
const word = ([red, green, blue]) => (255 << 24 | blue << 16 | green << 8 | red) >>> 0; // of a pixel, as it lies in memory
const RAMP_WORDS = Uint32Array.from(RAMP, word), PIN_WORDS = Uint32Array.from(PINS, (colour) => word(colour) & 0xffffff);

const element = (id) => document.getElementById(id);
const make = (tag, name, text = '') => Object.assign(document.createElement(tag), { className: name, textContent: text });
const state = { pins: [], point: null, components: 0, threshold: 0, matches: true, dirty: true, colours: true };
const cards = []; // of each image: its elements, and its maps source by source

// ---- drawing

// The pixels of a canvas: 32-bit words, to be filled, and `show`, which puts them onto it.
function pixelsOf(canvas, height, width) {
  Object.assign(canvas, { height, width });
  const context = canvas.getContext('2d', { willReadFrequently: true }), pixels = context.createImageData(width, height);
  return { width, height, words: new Uint32Array(pixels.data.buffer), show: () => context.putImageData(pixels, 0, 0) };
}

function paintColours({ map, pixels }) {
  const count = map.heat.length;
  const planes = [0, 1, 2].map((c) => Math.min(1 + 3 * state.components + c, K - 1));
  const level = (k, n) => Math.max(0, Math.min(255, Math.round(255 * (map.planes[k * count + n] - page.low[k]) / (page.high[k] - page.low[k] || 1))));
  for (let n = 0; n < count; n++) pixels.words[n] = word(planes.map((k) => level(k, n)));
  pixels.show();
}

function paintHeat({ map, pixels: { words, show } }, several) {
  const { heat, owner } = map, scale = 255 / (1 - page.floor), least = state.threshold || -2;
  for (let n = 0; n < heat.length; n++) {
    const index = Math.max(0, Math.min(255, Math.round((heat[n] - page.floor) * scale)));
    words[n] = heat[n] < least ? 0 : several ? PIN_WORDS[owner[n] % PINS.length] | index << 24 : RAMP_WORDS[index];
  }
  show();
}

// The outline of the mask: bars along all borders between what is shown and what is not, black, and white within.
function paintOutline(view, size) {
  const { map: { height, width, heat }, line } = view, scale = Math.max(2, Math.round(size / width));
  line.hidden = !state.threshold;
  if (line.hidden) return;
  if (line.width !== width * scale) view.outline = pixelsOf(line, height * scale, width * scale);
  const inside = (y, x) => heat[y * width + x] >= state.threshold, bars = []; // each: top, left, bottom, right
  for (let y = 1; y < height; y++) {
    for (let x = 0, from = -1; x <= width; x++) {
      const border = x < width && inside(y, x) !== inside(y - 1, x);
      if (border && from < 0) from = x;
      else if (!border && from >= 0) { bars.push(y, from, y, x); from = -1; }
    }
  }
  for (let x = 1; x < width; x++) {
    for (let y = 0, from = -1; y <= height; y++) {
      const border = y < height && inside(y, x) !== inside(y, x - 1);
      if (border && from < 0) from = y;
      else if (!border && from >= 0) { bars.push(from, x, y, x); from = -1; }
    }
  }
  const { words, show, width: across, height: down } = view.outline;
  words.fill(0);
  for (const [colour, thick] of [[word([0, 0, 0]), 2], [word([255, 255, 255]), 1]]) {
    for (let n = 0; n < bars.length; n += 4) {
      const left = Math.max(0, bars[n + 1] * scale - thick), right = Math.min(across, bars[n + 3] * scale + thick);
      const top = Math.max(0, bars[n] * scale - thick), bottom = Math.min(down, bars[n + 2] * scale + thick);
      for (let y = top; y < bottom; y++) for (let at = y * across + left; at < y * across + right; at++) words[at] = colour;
    }
  }
  show();
}

function setText(node, text) { // a text that stays the same costs no layout
  if (node.textContent !== text) node.textContent = text;
}

function place(mark, { y, x }) {
  mark.hidden = false;
  mark.style.left = `${100 * x}%`;
  mark.style.top = `${100 * y}%`;
}

function drawSource(source, points) {
  const wanted = (card) => points.length && (card.visible || state.matches);
  for (const card of cards) if (wanted(card)) compute(card.maps[source], source, points);
  const best = points.length && state.matches ? findMatches(source, points) : [];
  for (const card of cards) {
    const view = card.views[source], rank = best.findIndex((match) => match.image === card.image);
    view.match.hidden = rank < 0;
    if (rank >= 0) {
      setText(view.match, `${rank + 1} · ${best[rank].value.toFixed(2)}`);
      view.match.classList.toggle('low', best[rank].y > 0.8);
      view.match.style.setProperty('--x', best[rank].x);
      place(view.match, best[rank]);
    }
    if (!card.visible || !(points.length || state.colours || card.stale)) continue;
    if (points.length) {
      paintHeat(view, points.length > 1);
      paintOutline(view, page.video || card.element.classList.contains('large') ? 512 : 256);
    } else {
      paintColours(view);
      view.line.hidden = true;
    }
  }
}

function render() {
  const points = state.pins.length ? state.pins : state.point ? [state.point] : [];
  const began = performance.now();
  if (state.dirty) {
    for (const source of page.sources.keys()) drawSource(source, points);
    for (const card of cards) card.stale = !card.visible;
    state.dirty = state.colours = false;
  }
  for (const card of cards) {
    const here = state.point?.image === card.image;
    for (const view of card.views) {
      setText(view.value, here && points.length ? view.map.heat[cellOf(view.map, state.point)].toFixed(2) : '');
      view.cursor.hidden = !here;
      if (here) place(view.cursor, state.point);
    }
  }
  if (points.length) setText(element('speed'), `Last frame: ${(performance.now() - began).toFixed(1)} ms.`);
}

let asked = false;
function redraw() { // before the next frame is shown, however often it is asked for
  if (!asked) requestAnimationFrame(() => { asked = false; render(); });
  asked = true;
}

function changed(colours = false) {
  state.dirty = true;
  state.colours ||= colours;
  redraw();
}

// ---- points and pins

function pointAt(image, y, x, region = 0) {
  const [height, width] = page.images[image].grids[page.finest];
  return { image, y: (clampCell(y, height) + 0.5) / height, x: (clampCell(x, width) + 0.5) / width, region };
}

function cellText({ image, y, x }) {
  const [height, width] = page.images[image].grids[page.finest];
  return `${page.images[image].name}, row ${clampCell(y, height)}, column ${clampCell(x, width)}`;
}

function moveTo(point) {
  state.point = point;
  setText(element('status'), point ? cellText(point) : '');
  if (state.pins.length) redraw(); // the heat maps are those of the pins
  else changed(!point);
}

function addPin(region) {
  if (!state.point) return;
  const { image, y, x } = state.point;
  state.pins.push(pointAt(image, y, x, region ? state.threshold || REGION : 0));
  showPins();
}

function showPins() {
  for (const mark of document.querySelectorAll('.mark.pin')) mark.remove();
  element('pins').replaceChildren();
  state.pins.forEach((pin, number) => {
    const colour = `rgb(${PINS[number % PINS.length]})`;
    const button = make('button', '', `${number + 1} ×`);
    button.title = `Remove the pin at ${cellText(pin)}${pin.region ? ', region' : ''}`;
    button.style.borderColor = colour;
    button.onclick = () => { state.pins.splice(number, 1); showPins(); };
    element('pins').append(button);
    for (const view of cards[pin.image].views) {
      const mark = make('i', `mark pin${pin.region ? ' square' : ''}`);
      mark.style.background = colour;
      place(mark, pin);
      view.box.append(mark);
    }
  });
  const link = state.pins.map(({ image, y, x, region }) => {
    const [height, width] = page.images[image].grids[page.finest];
    return `image=${image}&y=${clampCell(y, height)}&x=${clampCell(x, width)}${region ? `&region=${region}` : ''}`;
  });
  history.replaceState(null, '', `#${link.join('&')}`);
  changed(true);
}

function readLink() {
  const pins = [];
  for (const part of location.hash.slice(1).split(/&?(?=image=)/)) {
    const link = new URLSearchParams(part), image = Number(link.get('image') ?? NaN);
    if (!page.images[image]) continue;
    const [height, width] = page.images[image].grids[page.finest];
    const at = (key, count) => ((Number(link.get(key)) || 0) + 0.5) / count;
    pins.push(pointAt(image, at('y', height), at('x', width), Number(link.get('region')) || 0));
  }
  if (!pins.length && !state.pins.length) return;
  state.pins = pins;
  if (pins.length) { showFrame(pins[0].image); cards[pins[0].image].element.scrollIntoView({ block: 'center' }); }
  showPins();
}

// ---- elements

function pane(title, picture, more = '') {
  const whole = make('div', `pane ${more}`), label = make('small', ''), value = make('output', ''), box = make('div', 'view');
  const image = make('img', '');
  image.src = picture;
  image.alt = title;
  label.append(make('span', '', title), value);
  box.append(image);
  whole.append(label, box);
  return { whole, box, value, image };
}

function mapView(title, picture, map) {
  const view = pane(title, picture);
  const parts = { canvas: make('canvas', 'map'), line: make('canvas', 'line'), match: make('b', 'match'), cursor: make('i', 'mark') };
  parts.line.hidden = parts.match.hidden = parts.cursor.hidden = true;
  view.box.append(...Object.values(parts));
  return Object.assign(view, parts, { map, pixels: pixelsOf(parts.canvas, map.height, map.width) });
}

function pointerOn(box, image) {
  const at = (event) => {
    const { left, top, width, height } = box.getBoundingClientRect();
    return pointAt(image, (event.clientY - top) / height, (event.clientX - left) / width);
  };
  box.onpointermove = (event) => { if (event.pointerType !== 'touch') moveTo(at(event)); };
  box.onpointerleave = (event) => { if (event.pointerType !== 'touch') moveTo(null); };
  box.onclick = (event) => {
    const point = at(event), before = state.point;
    moveTo(point);
    const again = before?.image === image && Math.hypot(before.y - point.y, before.x - point.x) < 0.06;
    if (event.pointerType !== 'touch' || again) addPin(event.shiftKey);
  };
}

const blobUrl = (text) => URL.createObjectURL(new Blob([Uint8Array.from(atob(text), (c) => c.charCodeAt(0))], { type: 'image/jpeg' }));

function build(item, image, maps) {
  const card = make('figure', 'card'), caption = make('figcaption', ''), panes = make('div', 'panes');
  const buttons = make('span', 'views'), picture = blobUrl(item.picture);
  card.tabIndex = 0;
  card.setAttribute('aria-label', `${item.name}: arrow keys move the point, Enter pins it`);
  for (const [view, title] of Object.entries(VIEWS)) buttons.append(Object.assign(make('button', '', title), { onclick: () => toggleView(card, view) }));
  caption.append(make('span', '', item.name), buttons);
  const views = maps.map((map, source) => mapView(`${page.sources[source]} ${map.height}×${map.width}`, picture, map));
  const photo = pane('image', picture, 'photo');
  const layers = item.layers.map((layer) => pane(layer.title, blobUrl(layer.picture)));
  photo.image.onload = () => {
    const { naturalWidth: width, naturalHeight: height } = photo.image;
    for (const { box } of [photo, ...views, ...layers]) box.style.aspectRatio = `${width} / ${height}`;
    photo.whole.style.setProperty('--natural', `${width}px`);
  };
  for (const { whole, box } of [photo, ...views, ...layers]) { panes.append(whole); pointerOn(box, image); }
  card.append(caption, panes);
  card.onkeydown = (event) => onKey(event, image);
  element('cards').append(card);
  return { element: card, image, maps, views, visible: false, stale: true };
}

// Shows a card as large as the window: all its maps, or its image at full size; or as one of many again.
function toggleView(card, view) {
  const open = !card.classList.contains(view);
  for (const name in VIEWS) card.classList.toggle(name, open && name === view);
  card.style.top = open ? `${Math.max(0, document.querySelector('.bar').getBoundingClientRect().bottom)}px` : '';
  document.body.style.overflow = open ? 'hidden' : '';
  const buttons = card.querySelectorAll('.views button');
  for (const [n, name] of Object.keys(VIEWS).entries()) setText(buttons[n], open && name === view ? 'Close' : VIEWS[name]);
  card.focus();
  changed(true);
}

function onKey(event, image) {
  if (event.target !== cards[image].element || event.ctrlKey || event.metaKey || event.altKey) return;
  const [height, width] = page.images[image].grids[page.finest];
  const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  if (move) {
    const from = state.point?.image === image ? state.point : pointAt(image, 0.5, 0.5);
    moveTo(pointAt(image, from.y + move[0] / height, from.x + move[1] / width));
  } else if (event.key === 'Enter') addPin(event.shiftKey);
  else if (event.key === 'f') toggleView(cards[image].element, 'large');
  else if (event.key === 'o') toggleView(cards[image].element, 'original');
  else return;
  event.preventDefault();
}

function showFrame(image) {
  if (!page.video) return;
  for (const card of cards) {
    card.visible = card.image === image;
    card.element.classList.toggle('current', card.visible);
  }
  element('frame').value = image;
  setText(element('frame-value'), page.images[image].name);
  changed(true);
}

function controls() {
  const slide = (id, use) => { element(id).oninput = () => use(Number(element(id).value)); use(Number(element(id).value)); };
  for (let first = 1; first < K && first < 25; first += 3) element('components').append(make('option', '', `PCA ${first}–${first + 2}`));
  element('components').onchange = (event) => { state.components = event.target.selectedIndex; changed(true); };
  slide('opacity', (value) => document.querySelectorAll('.map').forEach((canvas) => { canvas.style.opacity = value / 100; }));
  slide('size', (value) => element('cards').style.setProperty('--pane', `${value}px`));
  slide('threshold', (value) => {
    state.threshold = value / 100;
    element('threshold-value').textContent = value ? state.threshold.toFixed(2) : 'off';
    changed();
  });
  element('matches').onchange = (event) => { state.matches = event.target.checked; changed(); };
  element('pin').onclick = () => addPin(false);
  element('region').onclick = () => addPin(true);
  const clear = () => { state.pins = []; moveTo(null); showPins(); };
  element('clear').onclick = clear;
  const nudge = (id, by) => { element(id).value = Number(element(id).value) + by; element(id).oninput(); };
  const keys = {
    Escape: () => {
      const view = Object.keys(VIEWS).find((name) => document.querySelector(`.${name}`));
      if (view) toggleView(document.querySelector(`.${view}`), view);
      else clear();
    },
    c: () => { const list = element('components'); list.selectedIndex = (list.selectedIndex + 1) % list.length; list.onchange({ target: list }); },
    ' ': () => element('play').click(),
    m: () => element('matches').click(), '[': () => nudge('threshold', -2), ']': () => nudge('threshold', 2),
  };
  document.addEventListener('keydown', (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches('select')) return;
    if (event.key === ' ' && (!page.video || event.target.matches('button, input'))) return; // Space presses those
    if (event.key === ' ') event.preventDefault(); // and would scroll
    keys[event.key]?.();
  });
  element('time').hidden = !page.video;
  element('frame').max = page.images.length - 1;
  slide('frame', showFrame);
  let timer = 0;
  element('play').onclick = () => {
    element('play').textContent = timer ? 'Play' : 'Pause';
    clearInterval(timer);
    timer = timer ? 0 : setInterval(() => showFrame((Number(element('frame').value) + 1) % cards.length), 125);
  };
}

// Milliseconds of a frame, from one to the next, while the point moves; for `await measure(60)` in the console.
async function measure(frames = 60) {
  const next = () => new Promise(requestAnimationFrame);
  await next();
  const began = performance.now();
  for (let n = 0; n < frames; n++) { moveTo(pointAt(0, (n * 0.37) % 1, (n * 0.61) % 1)); await next(); }
  return (performance.now() - began) / frames;
}

async function start() {
  const values = await unpack(page.maps);
  let at = 0;
  document.body.classList.toggle('video', page.video);
  element('cards').style.setProperty('--columns', Math.min(page.sources.length + page.images[0].layers.length, 4));
  page.images.forEach((item, image) => {
    const maps = item.grids.map(([height, width]) => {
      const planes = values.subarray(at, at + height * width * K);
      at += planes.length;
      return decodeMap(planes, height, width);
    });
    cards.push(build(item, image, maps));
  });
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) { const card = cards.find((one) => one.element === entry.target); card.visible = entry.isIntersecting; }
    changed();
  }, { rootMargin: '100px' });
  for (const card of cards) seen.observe(card.element);
  const context = element('ramp').getContext('2d');
  RAMP.forEach((colour, index) => { context.fillStyle = `rgb(${colour})`; context.fillRect(index, 0, 1, 1); });
  element('low').textContent = page.floor.toFixed(2);
  element('note').textContent = page.note;
  controls();
  readLink();
  addEventListener('hashchange', readLink);
  changed(true);
  document.body.dataset.ready = 'true';
}

start().catch((error) => { element('status').textContent = `This browser cannot show the page: ${error.message}`; throw error; });
