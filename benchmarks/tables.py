"""The tables of docs/performance.md from the JSON that the other benchmarks write.

    python benchmarks/tables.py FOLDER     puts the results in FOLDER between their markers in the document

NAME.json goes between `<!-- NAME -->` and `<!-- end -->`, for the names that begin with kernels, throughput,
fp8, optimizer, diffusion or dataloading. gpu_suite.py writes the same tables to tables.md in its output
folder.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
PASSES = {"forward": "forward", "inputs": "gradients of inputs", "backward": "all gradients"}
STEPS = ("steps", "steps_measured")
WHERE = ("date", "device", "torch", "triton", "threads")


def main() -> None:
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        raise SystemExit(
            "usage: python benchmarks/tables.py FOLDER, a folder with kernels-*.json, throughput-*.json,"
            " fp8-*.json, optimizer-*.json, diffusion-*.json or dataloading-*.json"
        )
    document = DOCUMENT.read_text(encoding="utf-8")
    for name, table in tables(Path(sys.argv[1])).items():
        document = replace_table(document, name, table)
        print(f"{DOCUMENT}: {name}")
    DOCUMENT.write_text(document, encoding="utf-8")


def render_folder(folder: Path) -> str:
    """All tables of a folder's results, each between its markers."""
    return "\n".join(f"<!-- {name} -->\n{table}<!-- end -->\n" for name, table in tables(folder).items())


def tables(folder: Path) -> dict[str, str]:
    """File name without .json -> Markdown."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        if path.name.startswith("kernels"):
            found[path.stem] = kernels_table(json.loads(path.read_text(encoding="utf-8")))
        elif path.name.startswith("throughput"):
            found[path.stem] = throughput_table(json.loads(path.read_text(encoding="utf-8")))
        elif path.name.startswith("fp8"):
            found[path.stem] = fp8_tables(json.loads(path.read_text(encoding="utf-8")))
        elif path.name.startswith("optimizer"):
            found[path.stem] = optimizer_table(json.loads(path.read_text(encoding="utf-8")))
        elif path.name.startswith("diffusion"):
            found[path.stem] = diffusion_tables(json.loads(path.read_text(encoding="utf-8")))
        elif path.name.startswith("dataloading"):
            found[path.stem] = dataloading_tables(json.loads(path.read_text(encoding="utf-8")))
    return found


def replace_table(document: str, name: str, table: str) -> str:
    """The document with `table` between `<!-- name -->` and the next `<!-- end -->`; ValueError without."""
    pattern = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not pattern.search(document):
        raise ValueError(f"the document has no <!-- {name} --> with an <!-- end --> after it")
    return pattern.sub(lambda match: match[1] + table + match[2], document, count=1)


def kernels_table(result: dict[str, Any]) -> str:
    """A row per operation, shape and implementation; each pass in ms."""
    ops = list(dict.fromkeys(row["op"] for row in result["rows"]))
    rows = []
    for row in sorted(result["rows"], key=lambda row: ops.index(row["op"])):
        shape = " x ".join(map(str, row["shape"]))
        if "error" in row:
            cells = [row["error"].replace("|", "/"), "", ""]
        else:
            cells = [_of_pass(row, part) for part in PASSES]
        rows.append([row["op"], shape, row["implementation"], *cells])
    head = ["operation", "shape", "by", *PASSES.values()]
    note = "ms (times faster than the reference, share of the floor)"
    return f"{_provenance(result)}; {result['dtype']}; {note}:\n\n{_markdown(head, rows)}"


def throughput_table(rows: Sequence[dict[str, Any]]) -> str:
    """A row per task and size: images/s of each path, ours against the others, memory, share."""
    if not rows:
        return "Nothing was measured.\n"
    routes = [r for r in ("reference", "compile", "fused", "graphs") if any(row["path"] == r for row in rows)]
    by_task: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_task.setdefault((row["config"], row["name"]), {})[row["path"]] = row
    lines = []
    for (size, task), found in by_task.items():
        rates = [f"{found[r]['images_per_second']:.3g}" if r in found else "" for r in routes]
        memory = " / ".join(
            f"{found[r]['peak_memory_bytes'] / 2**20:.0f}" if r in found else "-" for r in routes
        )
        fused = found.get("fused")
        share = f"{fused['ceiling_share']:.1%}" if fused else ""
        batches = "/".join(dict.fromkeys(str(row["batch"]) for row in found.values()))
        ratios = [_faster(found, other) for other in ("reference", "compile")]
        lines.append([f"{task}, {size}, batch {batches}", *rates, *ratios, memory, share])
    head = ["images/s", *routes, "fused / reference", "fused / compile"]
    head += [f"peak MiB ({' / '.join(routes)})", "fused, of the ceiling"]
    return f"{_provenance(rows[0])}; {rows[0]['dtype']}:\n\n{_markdown(head, lines)}"


def fp8_tables(result: dict[str, Any]) -> str:
    """What fp8.py measured: layers, and where there are any reconstructions and times."""
    where = ", ".join(f"{key} {result[key]}" for key in WHERE[2:] if result.get(key))
    what = f"{result['encoder']}, {result['weights']} weights,"
    what += f" {result['images']} images of {result['pixels']} px"
    text = f"{result['date']}, {result['device']}, {where}; {what}:\n"
    for rows in (result["layers"], result.get("reconstructions"), [result.get("times_ms", {})]):
        if rows and rows[0]:
            head = [name.replace("_", " ") for name in rows[0]]
            cells = ([v if isinstance(v, str) else f"{v:.4g}" for v in row.values()] for row in rows)
            text += "\n" + _markdown(head, cells)
    return text


def optimizer_table(result: dict[str, Any]) -> str:
    """A row per side and pair of betas; then what could not be measured."""
    rows = [
        [
            row["by"],
            ", ".join(map(str, row["betas"])),
            f"{row['ms']:.3f}",
            f"{row['times_faster']:.2f}x",
            f"{row['share']:.0%}",
            f"{row['host_ms']:.2f}",
        ]
        for row in result["rows"]
    ]
    head = ["by", "betas", "ms", "faster than torch", "share of the floor", "host ms"]
    size = f"{result['parameters'] / 1e6:.1f} M parameters in {result['tensors']} tensors"
    left_out = "".join(f"\n{why}.\n" for why in result["left_out"].values())
    return f"{_provenance(result)}; {size}:\n\n{_markdown(head, rows)}{left_out}"


def diffusion_tables(result: dict[str, Any]) -> str:
    """Training, a row per model and path; sampling, a row per model, path and way to guide."""

    def what(row: dict[str, Any]) -> str:
        return f"{row['model']}-{row['size']}, depth {row['depth']}, batch {row['batch']}"

    training, sampling = [], []
    for row in result["rows"]:
        cells = [what(row), row["path"]]
        rate = f"{row['images_per_second']:.3g}"
        if row["task"] == "training":
            memory = row["peak_memory_bytes"]
            cells += [rate, f"{row['times_faster_than_reference']:.2f}x", f"{row['matrix_share']:.1%}"]
            training.append([*cells, "" if memory is None else f"{memory / 2**20:.0f}"])
        else:
            cells += [row["guided"], rate, f"{row['times_faster_than_always']:.2f}x"]
            sampling.append([*cells, f"{row['times_faster_than_reference_always']:.2f}x"])
    text = f"{_provenance(result)}; {', '.join(dict.fromkeys(row['dtype'] for row in result['rows']))}:\n"
    if training:
        head = ["training", "path", "images/s", "faster than reference", "of the matrix rate", "peak MiB"]
        text += "\n" + _markdown(head, training)
    if sampling:
        steps, measured = ({row[k] for row in result["rows"] if k in row}.pop() for k in STEPS)
        head = [f"sampling, {steps} steps ({measured} measured)", "path", "guided", "images/s"]
        head += ["faster than always", "faster than always by reference"]
        text += "\n" + _markdown(head, sampling)
    return text


def dataloading_tables(result: dict[str, Any]) -> str:
    where = [result["date"], result["device"], f"{result['cores']} cores", f"torch {result['torch']}"]
    parts = []
    if "images" in result:
        rows = [
            [
                row["format"],
                row["by"],
                f"{row['images_per_second']:.0f}",
                f"{row['times_faster']:.2f}x",
                f"{row['waits']:.1%}",
            ]
            for row in result["images"]
        ]
        head = ["format", "by", "images/s", "faster than the DataLoader", "waits"]
        parts.append(_markdown(head, rows))
        where.append(f"DALI {result['dali']}")
    if "latents" in result:
        rows = [
            [row["by"], f"{row['latents_per_second']:,.0f}", f"{row['times_faster']:.1f}x"]
            for row in result["latents"]
        ]
        parts.append(_markdown(["latents read by", "per second", "faster"], rows))
    return f"{', '.join(where)}:\n\n" + "\n".join(parts)


def _of_pass(row: dict[str, Any], part: str) -> str:
    if f"{part}_ms" not in row:
        return ""  # what is not differentiated has a forward pass alone
    faster = row.get(f"{part}_times_faster")
    ratio = "" if faster is None else f"{faster:.2f}x, "
    return f"{row[f'{part}_ms']:.3f} ({ratio}{row[f'{part}_share']:.0%})"


def _faster(found: dict[str, dict[str, Any]], other: str) -> str:
    if "fused" not in found or other not in found:
        return ""
    return f"{found['fused']['images_per_second'] / found[other]['images_per_second']:.2f}x"


def _provenance(result: dict[str, Any]) -> str:
    """Date, device, versions and measured rates."""
    rates = result.get("ceilings", result)
    parts = [f"{key} {result[key]}" for key in WHERE[2:] if result.get(key)]
    parts += [f"copy {rates['copy_bytes_per_second'] / 1e9:.3g} GB/s"]
    parts += [f"matrix product {rates['matrix_flops'] / 1e12:.3g} TFLOP/s"]
    return ", ".join([result["date"], result.get("device_name") or result["device"], *parts])


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


if __name__ == "__main__":
    main()
