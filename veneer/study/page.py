"""The report's style sheet and script, as text: they are written into the page, which fetches nothing.

Colours are dark enough (light mode) or light enough (dark mode) for 3 : 1 against the page and keep apart
for the common forms of colour blindness; marks and dashes say the same once more.
"""

STYLE = """
:root{color-scheme:light dark;--page:#fbfbf9;--card:#fff;--ink:#1d2126;--soft:#5b636d;--line:#dcdfe3;--grid:#e9ebee;--band:#1d21260f;
--accent:#0b6e63;
--c0:#0a66a8;--c1:#c24a00;--c2:#00795a;--c3:#a3457f;--c4:#8a6a00;--c5:#5a57c2;--c6:#4b5563;--c7:#b01f3c}
@media (prefers-color-scheme:dark){:root{--page:#14171a;--card:#1b1f23;--ink:#e7eaed;--soft:#9da6b0;--line:#343b43;--grid:#272d33;
--band:#ffffff14;--accent:#5fc9b8;
--c0:#62b5f0;--c1:#ff9256;--c2:#4ecfa4;--c3:#e796c6;--c4:#e2bf4a;--c5:#a9a6ff;--c6:#b6c0cc;--c7:#ff8296}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif;
-webkit-text-size-adjust:100%}
main{max-width:1480px;margin:0 auto;padding:32px 24px 40px}
h1{font-size:1.6rem;line-height:1.25;margin:0;letter-spacing:-.01em}
h2{font-size:1rem;margin:0 0 10px}
.sub{color:var(--soft);margin:4px 0 0}
.verdict{font-size:1.1rem;max-width:46em;margin:20px 0 28px;padding-left:14px;border-left:3px solid var(--accent)}
.c0{--c:var(--c0)}.c1{--c:var(--c1)}.c2{--c:var(--c2)}.c3{--c:var(--c3)}.c4{--c:var(--c4)}.c5{--c:var(--c5)}.c6{--c:var(--c6)}
.c7{--c:var(--c7)}
.chips{display:flex;flex-wrap:wrap;gap:8px;margin:28px 0 14px}
.chips button{display:inline-flex;align-items:center;gap:7px;font:inherit;font-size:.9rem;color:var(--ink);background:var(--card);
border:1px solid var(--line);
border-radius:99px;padding:3px 12px 3px 9px;min-height:32px;cursor:pointer}
.chips button[aria-pressed=false]{color:var(--soft);text-decoration:line-through;background:none}
.chips button[aria-pressed=false] .glyph{opacity:.35}
button:focus-visible,.series:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
.glyph{width:16px;height:16px;flex:none;vertical-align:-2px}
.charts{display:grid;grid-template-columns:repeat(3,1fr);gap:16px}
@media (max-width:1100px){.charts{grid-template-columns:1fr 1fr}}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 14px 8px;min-width:0}
figcaption{font-weight:600;font-size:.95rem;margin-bottom:6px}
figcaption span{display:block;font-weight:400;font-size:.84rem;color:var(--soft)}
.chart{display:block;width:100%;max-width:540px;height:auto;margin:0 auto;overflow:visible;font-size:12px}
.chart text{fill:var(--ink);paint-order:stroke;stroke:var(--card);stroke-width:3px;stroke-linejoin:round}
.chart .tick,.chart .axis,.chart .muted{fill:var(--soft)}
.chart .tick{font-size:11px;font-variant-numeric:tabular-nums}
.grid{stroke:var(--grid);fill:none}
.band{fill:var(--band)}
.mark{fill:var(--c);stroke:var(--card);stroke-width:1}
.whisker{stroke:var(--c);stroke-width:1.5;fill:none;opacity:.75}
.line{stroke:var(--c);stroke-width:1.8;fill:none;stroke-linejoin:round}
.lead{stroke:var(--c);stroke-width:.8;opacity:.6;fill:none}
.bubble{fill:var(--c);fill-opacity:.22;stroke:var(--c);stroke-width:1.2}
.series{outline:none}
.lit .series{opacity:.22}.lit .series.on{opacity:1}
.off{display:none}
.wrap{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:8px 12px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
th{font-size:.84rem;font-weight:600;color:var(--soft);vertical-align:bottom}
th:first-child,td:first-child{text-align:left;padding-left:4px}
td:first-child{white-space:normal;min-width:11em}
th button{font:inherit;color:inherit;background:none;border:0;padding:2px 0;cursor:pointer;text-align:inherit}
th[aria-sort=ascending] button::after{content:" \\2191"}th[aria-sort=descending] button::after{content:" \\2193"}
tr.best td{font-weight:600}
tr.reference td{color:var(--soft)}
code{font:.84em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;color:var(--soft);overflow-wrap:anywhere;font-weight:400}
.name code{display:block;margin-left:23px}
.badge{font-size:.76rem;font-weight:600;border:1px solid currentColor;border-radius:99px;padding:0 7px;margin-left:6px;white-space:nowrap;
color:var(--accent)}
.fail{color:var(--c7);white-space:normal;text-align:left}
.note{color:var(--soft);font-size:.88rem;max-width:60em}
dl{display:grid;grid-template-columns:max-content 1fr;gap:4px 18px;font-size:.9rem;margin:0}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
section{margin-top:32px}
#tip{position:fixed;z-index:9;max-width:min(320px,90vw);background:var(--ink);color:var(--page);font-size:.84rem;line-height:1.4;
padding:8px 11px;border-radius:7px;
white-space:pre-line;overflow-wrap:anywhere;pointer-events:none;visibility:hidden}
@media (max-width:720px){main{padding:22px 14px 32px}h1{font-size:1.35rem}.verdict{font-size:1rem;margin:16px 0 20px}
thead{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
table,tbody{display:block}tr{display:grid;grid-template-columns:1fr 1fr;gap:2px 16px;padding:10px 0;border-bottom:1px solid var(--line)}
td{display:flex;justify-content:space-between;gap:10px;border:0;padding:1px 0;font-size:.88rem}
td:first-child{grid-column:1/-1;display:block;padding:0 0 4px;font-size:1rem}
td[data-name]::before{content:attr(data-name);color:var(--soft);font-weight:400;white-space:normal;text-align:left}
td.fail{grid-column:1/-1}
.charts{grid-template-columns:1fr}figure{padding:10px 8px 4px}dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:6px}}
@media (max-width:480px){.chart{font-size:13px}.chart .tick{font-size:12.5px}}
@media print{:root{--page:#fff;--card:#fff;--ink:#000;--soft:#444;--line:#bbb;--grid:#e6e6e6;--band:#0000000f;--accent:#075a51;
--c0:#0a66a8;--c1:#c24a00;--c2:#00795a;--c3:#a3457f;--c4:#8a6a00;--c5:#5a57c2;--c6:#4b5563;--c7:#b01f3c}
@page{margin:14mm}body{font-size:10pt}main{padding:0 1px;max-width:none}h1{font-size:15pt}.verdict{font-size:11pt}
.charts{grid-template-columns:1fr 1fr;gap:8px}
figure,tr{break-inside:avoid}
th,td{padding:4px 6px;font-size:8.5pt}th{white-space:normal}td:first-child{min-width:15em}
.chips button[aria-pressed=false],#tip{display:none}.wrap{overflow:visible}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
@media (prefers-reduced-motion:no-preference){.series{transition:opacity .12s}}
"""

SCRIPT = """
'use strict';
(() => {
  const all = (query, root = document) => [...root.querySelectorAll(query)];
  const tip = document.getElementById('tip');
  // The browser's own tooltip of <title> would cover ours; the words move to aria-label.
  for (const svg of all('svg.chart')) {
    const title = svg.querySelector('title'), desc = svg.querySelector('desc');
    svg.setAttribute('aria-label', title.textContent + '. ' + desc.textContent);
    svg.removeAttribute('aria-labelledby');
    title.remove();
  }
  const place = (x, y) => {
    const w = tip.offsetWidth, h = tip.offsetHeight;
    tip.style.left = Math.max(6, Math.min(x + 14, innerWidth - w - 6)) + 'px';
    tip.style.top = (y + h + 24 > innerHeight ? Math.max(6, y - h - 12) : y + 16) + 'px';
  };
  const light = (m, on) => {
    document.body.classList.toggle('lit', on);
    for (const g of all('.series')) g.classList.toggle('on', on && g.dataset.m === m);
  };
  const show = (g, x, y) => { tip.textContent = g.dataset.tip; tip.style.visibility = 'visible'; place(x, y); light(g.dataset.m, true); };
  const hide = () => { tip.style.visibility = 'hidden'; light('', false); };
  for (const g of all('.series')) {
    g.addEventListener('pointermove', e => show(g, e.clientX, e.clientY));
    g.addEventListener('pointerleave', hide);
    g.addEventListener('focus', () => { const b = g.getBoundingClientRect(); show(g, b.left + b.width / 2, b.top + b.height / 2); });
    g.addEventListener('blur', hide);
  }
  document.addEventListener('keydown', e => { if (e.key === 'Escape') hide(); });
  for (const b of all('.chips button')) b.addEventListener('click', () => {
    const on = b.getAttribute('aria-pressed') === 'false';
    b.setAttribute('aria-pressed', on);
    for (const e of all(`[data-m="${b.dataset.of}"]`)) e.classList.toggle('off', !on);
  });
  for (const head of all('th button')) head.addEventListener('click', () => {
    const th = head.parentElement, k = th.cellIndex, body = th.closest('table').tBodies[0];
    const up = th.getAttribute('aria-sort') !== 'ascending';
    for (const other of all('th')) other.removeAttribute('aria-sort');
    th.setAttribute('aria-sort', up ? 'ascending' : 'descending');
    const key = row => row.cells[k] ? row.cells[k].dataset.v : '';
    const order = (a, b) => {
      const x = key(a), y = key(b);
      if (!x || !y) return !x - !y;
      const d = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
      return up ? d : -d;
    };
    body.append(...[...body.rows].sort(order));
  });
})();
"""
