"use strict";
const PALETTES = {
  light: { text: "#1d2126", line: "#e2e4e7", ground: "#ffffff",
           colors: ["#1f5fbf", "#c8501e", "#1b7f54", "#8440a8", "#9a7400", "#b8245f", "#007c89", "#5d6670"] },
  dark: { text: "#e6e8ea", line: "#33393f", ground: "#1c2024",
          colors: ["#82b1ff", "#ff9c6e", "#63d2a0", "#cf9bf0", "#e0c04c", "#ff86b3", "#55cfdb", "#aab4be"] },
};
const dark = matchMedia("(prefers-color-scheme: dark)");
const touch = matchMedia("(pointer: coarse)"); // a finger scrolls, and does not zoom into a chart
let chosen = null;

function scheme() {
  return chosen ?? (dark.matches ? "dark" : "light");
}

function painted(value, colors) { // "c3" is a colour of the palette
  if (Array.isArray(value)) return value.map((one) => painted(one, colors));
  if (value && typeof value === "object") {
    return Object.fromEntries(Object.entries(value).map(([key, one]) => [key, painted(one, colors)]));
  }
  const place = typeof value === "string" && /^c(\d+)$/.exec(value);
  return place ? colors[Number(place[1]) % colors.length] : value;
}

function layoutOf(panel, palette) {
  const axis = { gridcolor: palette.line, zerolinecolor: palette.line, linecolor: palette.line, automargin: true };
  const given = painted(panel.layout, palette.colors);
  const axes = Object.fromEntries(Object.keys({ xaxis: 0, yaxis: 0, ...given }).filter((key) => /^[xy]axis/.test(key))
    .map((key) => [key, { ...axis, ...given[key], title: { standoff: 12, ...given[key]?.title } }]));
  return {
    margin: { l: 56, r: 16, t: 8, b: 48 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: palette.text, family: "system-ui, sans-serif", size: 12 }, colorway: palette.colors,
    legend: { orientation: "h", y: -0.22 }, hovermode: "closest", dragmode: touch.matches ? false : "zoom",
    hoverlabel: { bgcolor: palette.ground, font: { color: palette.text } },
    showlegend: panel.traces.length > 1, ...given, ...axes,
  };
}

function draw() {
  const palette = PALETTES[scheme()];
  document.documentElement.dataset.scheme = scheme();
  for (const [place, panel] of panels.entries()) {
    const chart = document.getElementById(`chart-${place}`);
    if (chart && window.Plotly) {
      Plotly.react(chart, painted(panel.traces, palette.colors), layoutOf(panel, palette),
                   { responsive: true, displayModeBar: false });
    }
  }
}

async function unpack() { // the library is in the page, compressed
  const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (one) => one.charCodeAt(0));
  const text = new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  const script = document.createElement("script");
  script.textContent = await text;
  document.head.append(script);
}

const panels = JSON.parse(document.getElementById("panels").textContent);
dark.addEventListener("change", draw);
document.getElementById("scheme").addEventListener("click", () => {
  chosen = scheme() === "dark" ? "light" : "dark";
  draw();
});
draw();
if (panels.some((panel) => panel.traces.length)) unpack().then(draw);
