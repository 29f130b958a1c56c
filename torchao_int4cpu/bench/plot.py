"""Draw measured rows: time per layer over the rows of the activation. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torchao_int4cpu.bench.layers import Row
from torchao_int4cpu.extras import import_extra

#: Order, colour and name of the lines; others follow in matplotlib's own colours.
STYLES = {
    "bf16 linear": ("tab:gray", "dense bfloat16 (F.linear)"),
    "aten op": ("tab:orange", "PyTorch's int4 op"),
    "torchao prototype": ("tab:brown", "torchao's prototype"),
    "ours aten": ("tab:cyan", "this package, set_kernel('aten')"),
    "ours": ("tab:blue", "this package"),
    "ours int8": ("tab:purple", "this package, activations in 8 bits"),
    "ours compiled": ("tab:green", "this package, torch.compile"),
}


def require_matplotlib() -> None:
    """Fail before anything is measured.

    Raises:
        MissingExtra: it is not installed.
    """
    import_extra("matplotlib", "plot")


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """Write a picture with one panel a shape, both axes logarithmic.

    Args:
        rows: of one group size and dtype.
        path: its ending names the format: .svg, .png or .pdf.
        title: what was measured, where.

    Raises:
        MissingExtra: matplotlib is not installed.
        ValueError: matplotlib does not know the ending, or there are no rows.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    shapes = list(dict.fromkeys((row.n, row.k) for row in rows))
    if not shapes:
        raise ValueError("there is nothing to plot; give at least one shape and one number of rows")
    figure = Figure(figsize=(4.6 * len(shapes) + 0.4, 4.4), layout="constrained")
    panels = figure.subplots(1, len(shapes), squeeze=False)[0]
    for panel, (n, k) in zip(panels, shapes):
        here = [row for row in rows if (row.n, row.k) == (n, k)]
        names = sorted({row.kernel for row in here}, key=list(STYLES).index)
        for name in names:
            colour, label = STYLES[name]
            line = [row for row in here if row.kernel == name]
            panel.plot(
                [row.m for row in line], [row.ms for row in line], "o-", color=colour, label=label
            )
        ours = [row for row in here if row.kernel == "ours"]
        panel.plot(
            [row.m for row in ours],
            [row.limit_ms for row in ours],
            "--",
            color="black",
            label="limit of this machine (memory, arithmetic)",
        )
        panel.set(xscale="log", yscale="log", title=f"{n} × {k}", xlabel="rows of the activation (M)")
        panel.set_xticks([row.m for row in ours], [str(row.m) for row in ours])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("ms per layer")
    panels[0].legend(fontsize="small")
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
