"""The README's table of measured numbers, drawn from results/<device>.json: `make results`.

    python3 tests/benchmarks/gpu/table.py [gpu.json …]        keeps these first, as from a machine whose files were brought here

`LINES` says which measurement stands in which line and how it is written; a column is a device. What nobody has measured says so.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

if __package__:
    from gpu.results import RESULTS, device_of, keep, kept
# run as a script, from this folder
else:
    from results import RESULTS, device_of, keep, kept

README = Path(__file__).resolve().parents[3] / "README.md"
BEGIN, END = "<!-- measured: drawn by `make results` -->", "<!-- /measured -->"
NOTHING = "not measured yet"


class Line(NamedTuple):
    label: str
    part: str
    measurement: str
    cell: str  # a format of the measurement's numbers


LLAMA = "Llama-3.2-11B-Vision"
PASS = "{ms:.3g} ms, {extra_mib:.0f} MiB"
OP = "{ours_ms:.3g} ms, {ours_mib:.3g} MiB; {faster:.2g}× as fast as {other}, which takes {other_mib:.3g} MiB"
STEP = "{ms:.0f} ms ({time_to_plain:.2f} of plain), {peak_gib:.2f} GiB, planned {planned_gib:.2f}"
MAPS = "{pictures_per_second:.3g} pictures/s at {batch}, {peak_gib:.1f} GiB, {of_matmul:.0%} of the matmul ceiling"
LINES = [
    Line("kernels that are right", "right", "all", "{right} of {cases} cases"),
    Line("ceilings", "kernels", "ceilings", "copy {copy_gbps:.0f} GB/s, matmul {matmul_tflops:.0f} TFLOP/s"),
    Line("word_attention, forward and backward, Llama's sizes", "kernels", "word_attention", OP),
    Line("diffusion_attention, 64², 4 pictures", "kernels", "diffusion_attention", OP),
    Line("aligner_mse, forward and backward, 256 words", "kernels", "aligner_mse", OP),
    Line("stage 1, recipe paper", "stage1", "paper", MAPS),
    Line("stage 1, recipe noise", "stage1", "noise", MAPS),
    Line("stage 1, recipe noise, `--compile`", "stage1", "noise, compiled", MAPS),
    Line("stage 1, recipe null-text", "stage1", "null-text", MAPS),
    Line("a UNet pass, 8 pictures, not recorded", "stage1", "one pass, not recorded", PASS),
    Line("a UNet pass, recorded", "stage1", "one pass, ours", PASS),
    Line("a UNet pass, recorded as DAAM does", "stage1", "one pass, DAAM", PASS),
    *(
        Line(f"stage 2, a step, batch {b}, {case}", "stage2", f"{LLAMA}, batch {b}, {case}", STEP)
        for b in (1, 2)
        for case in ("plain", "layer-mean", "learn, low rank", "learn, full rank")
    ),
    Line(
        "toy tuning, losses beside a CPU's",
        "whole",
        "lavender-0, device and CPU",
        "{most_apart:.1%} apart in {steps} steps",
    ),
]


def cell(line: Line, report: dict[str, Any]) -> str:
    numbers = report["parts"].get(line.part, {}).get("numbers", {}).get(line.measurement)
    return NOTHING if numbers is None or "skipped" in numbers else line.cell.format(**numbers)


def draw(reports: Sequence[dict[str, Any]]) -> str:
    """A column a device; one that says that nothing is measured where there is none."""
    columns: list[Any] = list(reports) or [{"parts": {}}]
    names = [device_of(report) for report in reports] or ["a GPU"]
    rows = [[line.label, *(cell(line, report) for report in columns)] for line in LINES]
    table = [["", *names], ["---"] * (1 + len(columns)), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in table)


def put(readme: str, table: str) -> str:
    """The README with this table between its two marks."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError(f"README.md must hold {BEGIN} and {END} once each: the table goes between them")
    return readme.partition(BEGIN)[0] + f"{BEGIN}\n{table}\n{END}" + readme.partition(END)[2]


def main(new: Sequence[str], readme: Path = README, folder: Path = RESULTS) -> None:
    for path in new:
        report = json.loads(Path(path).read_text())
        if report["tiny"]:
            raise ValueError(f"{path} is of a run in small (TINY=1): the table is for a GPU's numbers")
        print(f"{path} is kept in {keep(report, folder)}")
    readme.write_text(put(readme.read_text(), draw(kept(folder))))
    print(f"{readme}: {len(LINES)} lines, {len(kept(folder))} devices")


if __name__ == "__main__":
    main(sys.argv[1:])
