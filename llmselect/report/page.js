// One selection is chosen at a time; what depends on it is drawn again.
function choose(index) {
  const view = data.views[index];
  list.items = itemsOf(index);
  list.told.selected = view.at.length < view.rows
    ? `${whole(view.at.length)} of the ${whole(view.rows)} rows that ${view.name} selected are on this page.`
    : `All ${whole(view.rows)} rows that ${view.name} selected.`;
  list.told.rejects = view.score ? `The rows that ${view.name} left, those of the best scores.` : `${view.name} scores no rows: nothing tells which of those it left came near.`;
  change({ which: 'selected', by: 'rank', down: false, open: null });
  list.kind.value = 'selected';
  drawDistributions(view);
  drawMethod(view);
  plane.chosen = new Map(view.at.map((at, i) => [at, view.ranks[i]]));
  plane.current = null;
  if (data.map) drawMap();
}

const picker = document.getElementById('view');
picker.append(...data.views.map((view, i) => el('option', { value: i }, view.name)));
picker.addEventListener('change', () => choose(Number(picker.value)));
makeMap();
makeExplorer();
drawResults();
drawSources();
drawOverlap();
// Baselines come first in most recipes; the first method that explains its picks says more.
const telling = data.views.findIndex((view, i) => data.why[i].selected.some((reasons) => reasons.length > 1));
picker.value = String(Math.max(0, telling));
choose(Math.max(0, telling));
