"""A layout of charts for TensorBoard's tab CUSTOM SCALARS."""

from collections.abc import Iterable

import torch

from megatron_vwn.training.monitoring.snapshot import OF_CONNECTIONS, OF_MODULES, Place, Snapshot

# Lines of one run have one colour in a custom chart, so more of them cannot be told apart.
LINES = 6
# Per chart: its title, and either bands (of a value, its least and its most, by tag) or lines (patterns of tags).
Charts = dict[str, tuple[str, list]]


def layout(snapshot: Snapshot, references: Iterable[str]) -> dict[str, Charts]:
    """Categories of charts: bands from smallest to largest over the trunk beside lines of reference, and some layers.

    Args:
        snapshot: of one step.
        references: tags of ``reference_scalars``.
    """
    places = [place for place in snapshot.connections if not place.depth]
    references = set(references)

    def bands(*names: str) -> Charts:
        found: Charts = {}
        for name in names:
            lines = [tag for tag in (f"vwn/{name}/birth", f"vwn/{name}/n") if tag in references]
            said = " and ".join(tag.rpartition("/")[2] for tag in lines)
            said = f", line{'s' * (len(lines) > 1)} at {said}" if lines else ""
            series = [tuple(f"vwn/{name}/{of}" for of in ("mean", "min", "max")), *((tag,) * 3 for tag in lines)]
            found[name.replace("_", " ") + said] = ("bands", series)
        return found

    def lines(name: str, places: list[Place]) -> Charts:
        few = [places[round(i)] for i in torch.linspace(0, len(places) - 1, min(LINES, len(places))).tolist()]
        if not few:
            return {}
        title = f"{name.replace('_', ' ')} of layers {', '.join(str(p.number) for p in few)}"
        own = [f"^vwn_layers/{name}/{place}$" for place in few]
        if f"vwn/{name}/n" in references:  # of other numbers every layer has a value at birth of its own
            own += [f"^{tag}$" for tag in (f"vwn/{name}/birth", f"vwn/{name}/n") if tag in references]
        return {title: ("lines", own)}

    kinds = [kind for kind in (*OF_CONNECTIONS, *OF_MODULES) if kind in snapshot.gradient_norms][:LINES]
    stability = bands("carry_gain_forward_max", "carry_gain_backward_max", "segment_norm_max", "gate_saturation")
    stability["gradient norms"] = ("lines", [f"^vwn/gradient_norm/{kind}$" for kind in kinds])
    return {
        "Virtual width: is it used?": bands("independent_segments", "dynamic_share", "effective_segments")
        | lines("independent_segments", places),
        "Virtual width: depth": bands("depth_window", "carry_kept", "carry_mixed") | lines("depth_window", places[1:]),
        "Virtual width: stability": stability,
    }


def layout_summary(categories: dict[str, Charts]):
    """The layout as a ``Summary`` of TensorBoard's.

    torch's ``add_custom_scalars`` has one band per chart, so only the envelope is taken from it.
    """
    from tensorboard.plugins.custom_scalar import layout_pb2
    from torch.utils.tensorboard.summary import custom_scalars

    written = layout_pb2.Layout()
    for title, charts in categories.items():
        category = written.category.add(title=title)
        for name, (kind, content) in reversed(charts.items()):  # TensorBoard shows the last chart first
            chart = category.chart.add(title=name)
            if kind == "lines":
                chart.multiline.tag.extend(content)
            for value, lower, upper in content if kind == "bands" else ():
                chart.margin.series.add(value=value, lower=lower, upper=upper)
    summary = custom_scalars({})
    summary.value[0].tensor.string_val[0] = written.SerializeToString()
    return summary
