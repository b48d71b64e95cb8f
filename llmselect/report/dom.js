// Elements and numbers. Text from data enters the page through textContent alone.
const data = JSON.parse(document.getElementById('data').textContent);

function el(name, options = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(options)) {
    if (key === 'on') for (const [event, action] of Object.entries(value)) made.addEventListener(event, action);
    else if (key === 'style') Object.assign(made.style, value);
    else if (value !== null && value !== undefined) made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function svg(name, options = {}, ...children) {
  const made = document.createElementNS('http://www.w3.org/2000/svg', name);
  for (const [key, value] of Object.entries(options)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

const place = (id) => document.querySelector(`#${id} > div`);
const note = (text) => el('p', { class: 'note' }, text);
const whole = (value) => Number(value).toLocaleString('en');
const percent = (value) => `${(100 * Math.min(1, value)).toFixed(2)}%`; // as a width
const share = (value) => `${(100 * value).toFixed(value < 0.0995 ? 1 : 0)} %`;

function short(value, digits = 4) {
  if (value === null || value === undefined) return '–';
  return Number.isInteger(value) ? whole(value) : String(Number(value.toPrecision(digits)));
}

function plainTable(head, lines, caption) {
  const cell = (name, value, i) => el(name, { class: i ? 'number' : '', ...(name === 'th' ? { scope: i ? 'col' : 'row' } : {}) }, value);
  return el('table', { 'aria-label': caption },
    el('thead', {}, el('tr', {}, ...head.map((one, i) => el('th', { scope: 'col', class: i ? 'number' : '' }, one)))),
    el('tbody', {}, ...lines.map((line) => el('tr', {}, ...line.map((one, i) => cell(i ? 'td' : 'th', one, i))))));
}

const sourceName = (code) => data.sources.names[code] || 'other sources';
const palette = ['#0072b2', '#e69f00', '#009e73', '#cc79a7', '#56b4e9', '#d55e00', '#b3a700', '#8e6fd8'];
const sourceColour = (code) => palette[code] ?? `hsl(${Math.round(code * 137.5) % 360}, 45%, 52%)`;
const rowText = (at) => data.rows.text[at].map((turn) => turn[1]).join(' · ');
