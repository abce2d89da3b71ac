"""Tables of what was measured on CPUs, for table.py."""

from __future__ import annotations

from typing import Any

_ROUNDING = 1e-4  # relative, of a whole model in float32


def int8(result: dict[str, Any]) -> str:
    """Layers with weights of 8 and 7 bits against float32 and ONNX Runtime."""
    names = list(result["rows"][0]["median_ms"])
    over = [
        f"{short} over {what}"
        for short in ("7-bit", "int8")
        for what in ("float32 sparse", "best float32", "ONNX int8")
    ]
    lines = [
        "| layer | pattern | " + ", ms | ".join(names) + ", ms | " + " | ".join(over) + " |",
        "|---|---|" + "---:|" * (len(names) + len(over)),
    ]
    for row in result["rows"]:
        cells = [f"{row['median_ms'][name]:.2f}" + _error(row["error"][name]) for name in names]
        ratios = [f"{ratio:.2f}x" for form in ("7-bit", "int8") for ratio in row[f"{form} sparse over"].values()]
        lines.append(f"| {row['layer']} | {row['pattern']} | " + " | ".join([*cells, *ratios]) + " |")
    return "\n".join(
        [
            *lines,
            "",
            f"{result['rows'][0]['tokens']} tokens, one thread, at `{result['level']}`; in turns, medians of "
            f"{result['rounds']} rounds, seed {result['seed']}; {result['hardware'].rpartition(',')[0]}, shared with other "
            f"work; torch {result['versions']['torch']}, ONNX Runtime {result['versions']['onnxruntime']}. In brackets the "
            "relative error, where it is more than float32's rounding. Ratios are medians of those of single rounds; the best "
            "float32 is the fastest of eager, prepacked and ONNX Runtime. From `benchmarks/cpu/int8.py`.",
        ]
    )


def dense_bits(with_vnni: dict[str, Any], without: dict[str, Any]) -> str:
    """Dense layers in few bits, with VNNI and kept to AVX2: times, errors, and what they gain."""
    lines = []
    for result in (with_vnni, without):
        names, ratios = list(result["rows"][0]["median_ms"]), list(result["rows"][0]["ratios"])
        lines += [
            f"| at `{result['level']}` | " + ", ms | ".join(names) + ", ms | " + " | ".join(ratios) + " |",
            "|---|" + "---:|" * (len(names) + len(ratios)),
        ]
        for row in result["rows"]:
            cells = [f"{row['median_ms'][name]:.2f}{_error(row['error'][name])}" for name in names]
            cells += [f"{row['ratios'][name]:.2f}x" for name in ratios]
            lines.append(f"| {row['layer']} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(
        [
            *lines,
            f"{with_vnni['threads']} threads; in turns, medians of {with_vnni['rounds']} rounds, seed {with_vnni['seed']}; "
            f"{with_vnni['hardware'].rpartition(',')[0]}, in the second table PyTorch and oneDNN kept to AVX2 too; torch "
            f"{with_vnni['versions']['torch']}. In brackets the relative error, where it is more than float32's rounding (at "
            "8:2:4 from the pruned weights). Ratios are medians of those of single rounds. From `benchmarks/cpu/dense_bits.py`.",
        ]
    )


def _error(error: float) -> str:
    return f" ({error:.1%})" if error > 1e-5 else ""


def opponents(result: dict[str, Any]) -> str:
    """Lowered models beside other engines: every form's time and error, and what the lowered ones gain."""
    cells = list(result["cells"].values())
    lines = [
        "| form | " + " | ".join(f"{cell['model']}, batch {cell['batch']}, ms" for cell in cells) + " |",
        "|---|" + "---:|" * len(cells),
    ]
    names = list(dict.fromkeys(name for cell in cells for name in cell["median_ms"]))
    for name in names:
        times = [_time(cell, name) for cell in cells]
        lines.append(f"| {_form(name, cells)} | " + " | ".join(times) + " |")
    for name in (name for name in names if name.startswith("lowered")):
        for title, key in _GAINS:
            own = [cell["speedup"][name].get(key, {}) for cell in cells]
            if any(own):
                lines.append(f"| *{name}*: {title} | " + " | ".join(map(_ratios, own)) + " |")
    spread = max(cell["iqr_ms"][name] / cell["median_ms"][name] for cell in cells for name in cell["median_ms"])
    versions = result["versions"]
    return "\n".join(
        [
            *lines,
            "",
            f"Random weights, pruned by magnitude; in turns, medians of {_rounds(cells, 'rounds')} rounds, seed {cells[0]['seed']}, "
            f"{result['threads']} threads; {result['hardware'].rpartition(',')[0]}{_hiding(result)}, interquartile ranges of up to "
            f"{spread:.0%} of the median; torch {versions['torch']}, ONNX Runtime {versions['onnxruntime']}, OpenVINO "
            f"{versions['openvino']}, NNCF {versions['nncf']}. 8 bits (7 of weights where those are faster) with `max_error` "
            f"{cells[0]['max_error']:g}. In brackets the error: the root mean square difference from the same weights in eager "
            "float32, in standard deviations of the output; none where it is rounding. From `benchmarks/cpu/opponents.py`.",
        ]
    )


def whole_picture(result: dict[str, Any]) -> str:
    """Pictures by a whole pipeline, and its three models by themselves, in every form."""
    lines: list[str] = []
    cells = list(result["cells"].values())
    for cell in cells:
        settings, medians, pictures = cell["settings"], cell["median_ms"], cell["median_ms"]["picture"]
        parts = [name for name in medians if name != "picture"]
        title = f"picture of {settings['height']} pixels in {settings['num_inference_steps']} steps"
        lines += [
            f"| form | {title}, ms | " + " | ".join(f"`{part}`, ms" for part in parts) + " |",
            "|---|" + "---:|" * (len(parts) + 1),
        ]
        told = cell | {"pattern": " or ".join(dict.fromkeys(filter(None, cell["patterns"].values()))), "speedup": {}}
        for name in pictures:
            times = " | ".join(f"{medians[part][name]:.0f}" for part in parts)
            lines.append(f"| {_form(name, [told])} | {_time(told | {'median_ms': pictures}, name)} | {times} |")
        for title, key in _GAINS:
            own = cell["speedup"].get(key, {})
            lines += [f"| *lowered, 8 bits*: {title} | {_ratios(own)} |" + " |" * len(parts)] if own else []
        lines.append("")
    spreads = [
        width / cell["median_ms"][what][name]
        for cell in cells
        for what, widths in cell["iqr_ms"].items()
        for name, width in widths.items()
    ]
    versions = result["versions"]
    return "\n".join(
        [
            *lines,
            "Stable Diffusion 1.5 with random weights, its UNet and decoder pruned by magnitude, its text encoder dense; with "
            "guidance, so that the UNet is asked for two samples at once. The pipeline's own code draws, from the same noise; in "
            f"turns, medians of {_rounds(cells, 'rounds')} rounds, seed {cells[0]['seed']}, {result['threads']} threads; "
            f"{result['hardware'].rpartition(',')[0]}, interquartile ranges of up to {max(spreads):.0%} of the median; torch "
            f"{versions['torch']}, diffusers {versions['diffusers']}, OpenVINO {versions['openvino']}, NNCF {versions['nncf']}. "
            f"8 bits with `max_error` {cells[0]['max_error']:g} for each model. In brackets the error: the root mean square "
            "difference from the picture that the same weights draw in eager float32, in standard deviations of that picture. From "
            "`benchmarks/cpu/whole_picture.py`.",
        ]
    )


_GAINS = (
    ("over the best that is no less exact", "over the best no less exact"),
    ("over the fastest other engine", "over the fastest other engine"),
    ("over dense by the same kernels", "over dense in few bits here"),
)


def _ratios(own: dict[str, float]) -> str:
    return " ".join(f"{ratio:.2f}x ({who})" for who, ratio in own.items()) or "—"


def _hiding(result: dict[str, Any]) -> str:
    return f" ({result['hidden']} hidden from all of them)" if result.get("hidden") else ""


def _form(name: str, cells: list[dict[str, Any]]) -> str:
    if not name.startswith("lowered"):
        return f"{name}, dense"
    patterns = " or ".join(dict.fromkeys(cell["pattern"] for cell in cells))
    return f"{name}, {patterns}"


def _time(cell: dict[str, Any], name: str) -> str:
    if name not in cell["median_ms"]:
        return "—"
    error, choice = cell["error"][name], cell["speedup"].get(name, {}).get("choice", "")
    compiled = ", compiled" if choice.endswith(", compiled") else ""
    return f"{cell['median_ms'][name]:.0f}" + (f" ({error:.1%})" if error > _ROUNDING else "") + compiled


def peaks(result: dict[str, Any]) -> str:
    """Each layer's share of what the machine can multiply."""
    known = ("eager", "onednn", "vnm", "vnm-int8", "vnm-w7a8", "vnm-w8a8")
    forms = [name for name in known if all(name in layer["forms"] for layer in result["layers"])]
    lines = [
        f"| layer | M × N × K | {' | '.join(forms)} | memory alone, ms |",
        "|---|---|" + "---:|" * (len(forms) + 1),
    ]
    for layer in result["layers"]:
        more = f" and {layer['count'] - 1} more" if layer["count"] > 1 else ""
        shape = ", ".join(" × ".join(map(str, sizes)) for sizes in layer["shapes"])
        cells = [
            f"{own['median_ms']:.2f} ms, {own['share_of_peak']:.0%}" for own in map(layer["forms"].__getitem__, forms)
        ]
        lines.append(f"| `{layer['layer']}`{more} | {shape} | {' | '.join(cells)} | {layer['memory_bound_ms']:.2f} |")
    low, high = result["peaks_gflops_quartiles"]["floats"]
    tops = result["peaks_gflops"]
    return "\n".join(
        [
            *lines,
            "",
            f"Kernels of the level `{result['level']}`. Shares are of the multiply-adds that this machine does in registers, in the "
            f"same round, of what the kernel multiplies: {tops['floats']:.0f} GFLOP/s of float32 on a thread (quartiles {low:.0f} and "
            f"{high:.0f}), {tops['words']:.0f} of 16-bit numbers (`vnm-int8`), {tops['bytes']:.0f} of bytes (`vnm-w7a8`, `vnm-w8a8`). "
            f"They count what is really multiplied: half for 4:2:4. Batch {result['batch']}, medians of {result['n']} rounds, seed "
            f"{result['seed']}; {result['hardware'].rpartition(',')[0]}; memory is read at {result['read_gbytes_per_s']:.0f} GB/s. "
            "From `benchmarks/cpu/roofline.py`.",
        ]
    )


def levels(result: dict[str, Any]) -> str:
    """The kernels of few bits at several instruction sets of one processor."""
    by = {
        "avx2": ("vnm-w7a8", "attention-int16"),
        "avx_vnni": ("vnm-w8a8", "attention-int8"),
        "avx512_vnni": ("vnm-w8a8", "attention-int8"),
    }
    lines = [
        "| layer | "
        + " | ".join(f"`{level}`, ms" for level in by)
        + " | `avx_vnni` over `avx2` | `avx512_vnni` over it |",
        "|---|" + "---:|" * (len(by) + 2),
    ]
    for row in result["rows"]:
        first, *others = [
            next(f"{level}, {one}" for one in own if f"{level}, {one}" in row["median_ms"]) for level, own in by.items()
        ]
        times = " | ".join(f"{row['median_ms'][name]:.2f}" for name in (first, *others))
        over = " | ".join(f"{row[f'over {first}'][name]:.2f}x" for name in others)
        lines.append(f"| {row['layer']} | {times} | {over} |")
    return "\n".join(
        [
            *lines,
            "",
            "`vnm-w7a8` and `attention-int16` at `avx2`, `vnm-w8a8` and `attention-int8` at the others. One thread; in turns, "
            f"medians of {result['rounds']} rounds, seed {result['seed']}; {result['hardware'].rpartition(',')[0]}. "
            "From `benchmarks/cpu/levels.py`.",
        ]
    )


def projections(result: dict[str, Any]) -> str:
    """Fused projections over those that are apart."""
    lines = [
        f"| whole model, compiled | dense | lowered, float32 | lowered, error of {result['max_error']:.0%} at most |",
        "|---|---:|---:|---:|",
    ]
    for name, cell in result["cells"].items():
        gains = [cell["fused over apart"][form] for form in ("dense", "float32", "few bits")]
        told = (f"{one['median']:.2f}x ({one['quartiles'][0]:.2f} to {one['quartiles'][1]:.2f})" for one in gains)
        lines.append(f"| {name} | " + " | ".join(told) + " |")
    return "\n".join(
        [
            *lines,
            "",
            "4:2:4 (the UNet 8:2:4) by magnitude. Fused over apart, each at its fastest form, in turns in one process: medians "
            f"of {result['rounds']} rounds and quartiles, seed {result['seed']}; {result['hardware']}; torch "
            f"{result['versions']['torch']}. From `benchmarks/cpu/projections.py`.",
        ]
    )


_MODELS = {"uvit-s2": "U-ViT-S/2, 32x32", "ddpm-cifar10": "DDPM UNet, CIFAR-10"}


def lowering(result: dict[str, Any]) -> str:
    """The speed of lowered models against dense ones."""
    lines = [
        "| model | pattern | precision | batch | eager dense, ms | best dense, ms | lowered, ms | over eager | over best dense |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    cells = list(result["cells"].values())
    for cell in cells:
        times, speed = cell["median_ms"], cell["speedup"]
        eager = times.get("eager float32", times["eager"])
        best = f"{times[cell['best_dense']]:.1f} ({_DENSE[cell['best_dense']]})"
        precision = cell["dtype"] + (", AVX2 only" if cell["level"] == "avx2" else "")
        lines.append(
            f"| {_MODELS[cell['model']]} | {cell['pattern']} | {precision} | {cell['batch']} | {eager:.1f} | {best} "
            f"| {times['lowered']:.1f} | {speed['over eager float32']:.2f}x | {speed['over best dense']:.2f}x |"
        )
    first = cells[0]
    return "\n".join(
        [
            *lines,
            "",
            "Whole forward passes, random weights; in turns, medians of "
            f"{_rounds(cells)} rounds, seed {first['seed']}; {first['hardware']}; "
            f"torch {first['versions']['torch']}. Eager dense is float32 in "
            "every line; the best dense form is the fastest of eager, prepacked and compiled in the line's own precision. "
            "U-ViT: every Linear of every block; UNet: every layer that the pattern fits. From `benchmarks/cpu/lowering.py`.",
        ]
    )


def _rounds(cells: list[dict[str, Any]], key: str = "n") -> str:
    counts = sorted({cell[key] for cell in cells})
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


_DENSE = {
    "eager": "eager",
    "dense": "prepacked",
    "eager, compiled": "compiled",
    "dense, compiled": "prepacked, compiled",
}


def sway(result: dict[str, Any]) -> str:
    """How much the speed of one form over another changes where processes take the cores."""
    lines = [
        "| model, batch | processes that spin | cores taken | lowered over eager | lowered over prepacked | prepacked over eager |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for cell in result["cells"]:
        over = cell["lowered over"]
        lines.append(
            f"| `{cell['model']}`, {cell['pattern']}, {cell['batch']} | {cell['processes']} | {cell['taken']:.1%} "
            f"| {over['eager']:.2f}x | {over['dense']:.2f}x | {cell['dense over eager']:.2f}x |"
        )
    changes = []
    for cell in result["cells"]:
        (idle,) = (o for o in result["cells"] if o["model"] == cell["model"] and not o["processes"])
        pairs = [(cell["lowered over"][name], idle["lowered over"][name]) for name in cell["lowered over"]]
        changes += [busy / quiet for busy, quiet in [*pairs, (cell["dense over eager"], idle["dense over eager"])]]
    return "\n".join(
        [
            *lines,
            "",
            f"The largest change of a ratio is {max(changes):.2f}x, the smallest {min(changes):.2f}x. Sparse forms were kept whatever "
            f"they gained; in turns, medians of {result['rounds']} rounds, seed {result['seed']}; {result['hardware']}; "
            f"torch {result['versions']['torch']}. "
            "From `benchmarks/cpu/sway.py`.",
        ]
    )


def tokens(result: dict[str, Any]) -> str:
    """Blocks of large models on whole images."""
    lines = [
        "| model | eager, ms | best dense, ms | lowered, ms | over best dense | layers on sparse kernels | memory, dense, MiB "
        "| lowered by a plan, MiB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    cells = result["cells"]
    for name, cell in cells.items():
        times, layers = cell["median_ms"], cell["layers"]
        dense = min(ms for form, ms in times.items() if form != "lowered")
        memory = (cell["memory_mib"][form] for form in ("as it is", "lowered"))
        taken = " | ".join(f"{one['now']:.0f} ({one['most']:.0f})" for one in memory)
        lines.append(
            f"| {name} | {times['eager']:.0f} | {dense:.0f} | {times['lowered']:.0f} | {cell['over the best dense']['lowered']:.2f}x "
            f"| {layers.get('vnm', 0)} of {sum(layers.values()) - layers.get('attention', 0)} | {taken} |"
        )
    rounds = sorted({cell["rounds"] for cell in cells.values()})
    return "\n".join(
        [
            *lines,
            "",
            f"{result['pattern']} by magnitude in the Linears of the blocks that read tokens; in turns, medians of "
            f"{' or '.join(map(str, rounds))} rounds, seed {result['seed']}, {result['threads']} threads; the best dense form is the "
            f"best of PyTorch's, with this project's attention where that is faster. Memory is that of a process of its own after two "
            f"calls, in brackets at most, Python and PyTorch (some 550 MiB) in it. {result['hardware']}; "
            f"torch {result['versions']['torch']}. From `benchmarks/cpu/tokens.py`.",
        ]
    )
