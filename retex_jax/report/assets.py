"""The inline style and script of the page."""

# ruff: noqa: E501

STYLE = """
:root{color-scheme:light;--ink:#1f2933;--muted:#52606d;--line:#d9dee4;--soft:#f5f7f9;--accent:#0072b2}
*{box-sizing:border-box}
body{margin:0;background:#fff;color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1160px;margin:0 auto;padding:28px 20px 48px}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 4px}
h2{font-size:1.2rem;margin:40px 0 4px}
h3{font-size:1rem;margin:0 0 2px}
p{margin:4px 0 12px;max-width:76ch}
.meta,.note,figcaption p{color:var(--muted);font-size:.9rem}
.meta{display:flex;flex-wrap:wrap;gap:2px 18px;max-width:none;overflow-wrap:anywhere}
.meta b{color:var(--ink);font-weight:600}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(250px,1fr));gap:10px;margin:20px 0 0;padding:0}
.tiles div{background:var(--soft);border-radius:8px;padding:12px 14px}
.tiles dt{font-size:.82rem;color:var(--muted);line-height:1.3}
.tiles dd{margin:0 0 2px;font-size:1.5rem;font-weight:650;font-variant-numeric:tabular-nums;line-height:1.25}
.tiles div{display:flex;flex-direction:column-reverse;justify-content:flex-end}
.tiles .main{background:#e6f1f8}.tiles .main dd{color:#00517f}
.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:8px}
table{border-collapse:separate;border-spacing:0;width:100%;font-size:.88rem;font-variant-numeric:tabular-nums}
th,td{padding:6px 10px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
tbody tr:last-child>*{border-bottom:0}
th{font-weight:600}
thead th{background:var(--soft);vertical-align:bottom;white-space:normal;min-width:76px;padding:0}
th.text,td.text,thead th.text button{text-align:left}
thead button{all:unset;box-sizing:border-box;width:100%;padding:7px 10px;cursor:pointer;text-align:right;line-height:1.25}
thead button:focus-visible,summary:focus-visible,.scroll:focus-visible{outline:2px solid var(--accent);outline-offset:-2px}
thead button::after{content:"\\a0\\2195";color:#b5bec8}
[aria-sort=ascending] button::after{content:"\\a0\\2191";color:var(--ink)}
[aria-sort=descending] button::after{content:"\\a0\\2193";color:var(--ink)}
tbody th{font-weight:500}
td.text{white-space:normal;min-width:128px}
tbody th,thead th:first-child{position:sticky;left:0;z-index:1;text-align:left}
tbody th{background:#fff}
tfoot th,tfoot td{font-weight:650;border-top:2px solid var(--line);border-bottom:0;background:var(--soft)}
tfoot th{position:sticky;left:0;text-align:left}
.low{background:#fdf0d5}.lower{background:#f8cfa9}
.key{display:inline-block;width:.9em;height:.9em;border:1px solid var(--line);border-radius:3px;vertical-align:-.1em}
.figures{columns:2 440px;column-gap:32px;margin-top:16px}
figure{margin:0 0 34px;break-inside:avoid}
figure svg{display:block;width:100%;max-width:560px;height:auto;margin-top:6px}
svg text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,sans-serif!important}
details{border:1px solid var(--line);border-radius:8px;margin:12px 0}
summary{cursor:pointer;padding:10px 14px;font-weight:600}
details .scroll{border-width:1px 0 0;border-radius:0}
pre{margin:0;padding:12px 14px;overflow-x:auto;font-size:.82rem;border-top:1px solid var(--line);background:var(--soft)}
@media(max-width:520px){main{padding:20px 16px 40px}.tiles{grid-template-columns:1fr 1fr}
th,td{padding:6px 8px}thead button{padding:6px 8px}tbody th{max-width:46vw;white-space:normal;overflow-wrap:break-word}}
@media print{.scroll{overflow:visible}thead button::after{content:""}}
"""

SCRIPT = """
for (const button of document.querySelectorAll("thead button")) button.onclick = () => {
  const head = button.parentNode, table = head.closest("table"), body = table.tBodies[0];
  const up = head.getAttribute("aria-sort") === "descending" ||
    (!head.hasAttribute("aria-sort") && head.classList.contains("text"));
  const value = row => row.cells[head.cellIndex].dataset.value;
  const order = (a, b) => {
    const x = value(a), y = value(b);
    if (x === "" || y === "") return (x === "") - (y === "");
    const by = head.classList.contains("text") ? x.localeCompare(y) : x - y;
    return up ? by : -by;
  };
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  body.append(...[...body.rows].sort(order));
};
"""
