// The rows of a selection: searched, sorted, in pages; each opens to its text and to why it was picked.
const PAGE = 20;
const list = { which: 'selected', query: '', by: 'rank', down: false, page: 0, open: null, items: [], rows: [], told: {} };
const columns = [['rank', 'rank', '5rem'], ['score', 'score', '7rem'], ['source', 'source', '10rem'], ['tokens', 'tokens', '6rem'], ['text', 'row', '']];

function itemsOf(index) {
  const view = data.views[index], why = data.why[index];
  const item = (at, rank, score, reasons, weight) => ({ at, rank, score, reasons, weight, source: sourceName(data.rows.source[at]), tokens: data.rows.tokens[at], text: rowText(at) });
  return { selected: view.at.map((at, i) => item(at, view.ranks[i], view.score && view.score[i], why.selected[i], view.weight && view.weight[i])),
    rejects: view.rejects.map((at, i) => item(at, null, view.reject_score[i], why.rejects[i])) };
}

function sorted(items) {
  const wanted = list.query.trim().toLowerCase();
  const found = wanted ? items.filter((one) => `${one.text}\n${one.source}\n${data.rows.id[one.at]}`.toLowerCase().includes(wanted)) : [...items];
  if (list.by === 'rank' && list.which === 'rejects') return found;
  const order = (a, b) => (typeof a === 'string' ? a.localeCompare(b) : (a ?? -Infinity) - (b ?? -Infinity));
  return found.sort((a, b) => (list.down ? -1 : 1) * order(a[list.by], b[list.by]));
}

function turns(messages) {
  return messages.map(([role, said, more]) => el('div', { class: 'turn', dir: 'auto' }, el('span', { class: 'role', dir: 'ltr' }, role), said,
    more ? el('span', { class: 'role' }, `… ${whole(more)} more characters`) : null));
}

const example = (row, told) => (data.targets[row]
  ? el('div', { class: 'reason' }, el('b', {}, told), data.targets[row].group, el('div', { class: 'example' }, ...turns(data.targets[row].text))) : null);

function latents(reason) {
  const most = Math.max(...reason.rows.flatMap((one) => one.slice(1)).filter((value) => value !== null), 1e-9);
  const bars = ([, mine, theirs]) => el('span', { class: 'track' }, el('i', { style: { width: percent((theirs ?? 0) / most) } }), el('i', { style: { width: percent((mine ?? 0) / most) } }));
  const head = (name, mark) => el('th', { scope: 'col', class: 'number' }, el('span', { class: mark }), name);
  return el('div', { class: 'reason' }, el('b', {}, 'SAE latents that decided'), el('table', { class: 'latents' },
    el('thead', {}, el('tr', {}, el('th', { scope: 'col' }, 'latent'), head('row', 'key chosen'), head('target', 'key'), el('th', {}))),
    el('tbody', {}, ...reason.rows.map((one) => el('tr', {}, el('td', {}, String(one[0])), el('td', { class: 'number' }, short(one[1])),
      el('td', { class: 'number' }, short(one[2])), el('td', {}, bars(one)))))), note(`What they fire on: llmselect sae describe RUN/config.yaml --latents ${reason.rows.map((one) => one[0]).join(',')}`));
}

function heat(reason) {
  const scores = reason.parts.map((part) => part[1]).filter((value) => value !== null), low = Math.min(...scores), high = Math.max(...scores);
  const shade = (value) => `rgba(var(--heat), ${(high > low ? 0.25 + 0.6 * ((value - low) / (high - low)) : 0.6).toFixed(3)})`;
  return el('div', { class: 'reason' }, el('b', {}, `Tokens that scored highest for ${reason.group}`), el('div', { class: 'heat', dir: 'auto' },
    ...reason.parts.map(([said, value]) => (value === null ? said : el('mark', { title: short(value), style: { background: shade(value) } }, said)))));
}

function reasonOf(reason) {
  if (reason.kind === 'heat') return heat(reason);
  if (reason.kind === 'latents') return reason.rows.length ? latents(reason) : null;
  if (reason.kind === 'target') return example(reason.row, { nearest: 'nearest target example', query: 'picked for the target example' }[reason.name] ?? reason.name);
  const value = reason.kind === 'text' ? reason.value : [].concat(reason.value).map((one) => short(one)).join(', ') + (reason.more ? ', …' : '');
  return el('div', { class: 'reason' }, el('b', {}, reason.name.replaceAll('_', ' ')), value);
}

function detail(item) {
  const known = item.reasons.some((one) => one.kind === 'target' && one.name === 'nearest'), near = data.map && data.map.near ? data.map.near[item.at] : -1;
  const why = item.reasons.map(reasonOf).filter(Boolean);
  if (item.weight !== null && item.weight !== undefined) why.unshift(el('div', { class: 'reason' }, el('b', {}, 'weight'), short(item.weight)));
  if (!why.length) why.push(note(list.which === 'selected' ? 'This method keeps no evidence for single rows.' : 'Not selected.'));
  if (!known && near >= 0) why.push(example(near, `nearest target example in ${data.map.feature} (cosine ${short(data.map.cosine[item.at], 3)})`));
  return [note(`row ${whole(data.rows.pool[item.at])} of the pool, id ${data.rows.id[item.at]}`), el('h3', {}, 'Why'), ...why,
    el('h3', {}, 'Row'), ...turns(data.rows.text[item.at])];
}

function lineOf(item) {
  const open = list.open === item.at;
  const button = el('button', { class: 'open', type: 'button', dir: 'auto', 'aria-expanded': String(open), on: { click: () => {
    list.open = open ? null : item.at;
    drawRows();
    list.body.querySelector(`[data-at="${item.at}"] .open`)?.focus();
  } } }, item.text.slice(0, 240) || '(empty)');
  const cells = [item.rank === null ? '–' : whole(item.rank + 1), short(item.score), item.source, whole(item.tokens), button];
  const line = el('tr', { 'data-at': item.at }, ...cells.map((one, i) => el('td', { class: [0, 1, 3].includes(i) ? 'number' : '' }, one)));
  return open ? [line, el('tr', { class: 'detail' }, el('td', { colspan: '5' }, ...detail(item)))] : [line];
}

function drawRows() {
  list.rows = sorted(list.items[list.which]);
  const pages = Math.max(1, Math.ceil(list.rows.length / PAGE));
  list.page = Math.min(Math.max(0, list.page), pages - 1);
  list.body.replaceChildren(...list.rows.slice(list.page * PAGE, (list.page + 1) * PAGE).flatMap(lineOf));
  for (const [name, head] of list.heads) head.setAttribute('aria-sort', name !== list.by ? 'none' : list.down ? 'descending' : 'ascending');
  list.note.textContent = list.told[list.which];
  list.count.textContent = `${whole(list.rows.length)} ${list.rows.length === 1 ? 'row' : 'rows'}, page ${list.page + 1} of ${pages}`;
  list.back.disabled = !list.page;
  list.next.disabled = list.page >= pages - 1;
}

function change(values) {
  Object.assign(list, { page: 0 }, values);
  drawRows();
}

// Show a row of the page in the table: among the selected rows, the rejects, or by itself.
function openRow(at) {
  for (const which of ['selected', 'rejects']) {
    if (!list.items[which].some((one) => one.at === at)) continue;
    Object.assign(list, { which, query: '', open: at });
    list.search.value = '';
    list.kind.value = which;
    list.page = Math.floor(sorted(list.items[which]).findIndex((one) => one.at === at) / PAGE);
    drawRows();
    const button = list.body.querySelector(`[data-at="${at}"] .open`);
    button.scrollIntoView({ block: 'center' });
    button.focus({ preventScroll: true });
    return;
  }
}

function makeExplorer() {
  const choice = (value, name) => el('option', { value }, name);
  list.kind = el('select', { 'aria-label': 'Which rows', on: { change: (event) => change({ which: event.target.value, by: 'rank', down: false }) } },
    choice('selected', 'selected rows'), choice('rejects', 'best-scored rejects'));
  list.search = el('input', { type: 'search', placeholder: 'text, source or id', 'aria-label': 'Search rows', on: { input: (event) => change({ query: event.target.value }) } });
  const turn = (name, step) => el('button', { type: 'button', on: { click: () => { list.page += step; drawRows(); } } }, name);
  [list.back, list.next] = [turn('Previous', -1), turn('Next', 1)];
  list.count = el('span', { 'aria-live': 'polite' });
  list.heads = columns.map(([name, label, width]) => [name, el('th', { scope: 'col', style: width ? { width } : {}, class: ['rank', 'score', 'tokens'].includes(name) ? 'number' : '' },
    el('button', { type: 'button', on: { click: () => change({ by: name, down: list.by === name ? !list.down : name === 'score' }) } }, label))]);
  list.body = el('tbody');
  list.note = note('');
  place('explorer').replaceChildren(list.note, el('div', { class: 'controls' }, list.kind, list.search, list.back, list.next, list.count),
    el('div', { class: 'wide' }, el('table', { 'aria-label': 'Rows' }, el('thead', {}, el('tr', {}, ...list.heads.map((one) => one[1]))), list.body)));
}
