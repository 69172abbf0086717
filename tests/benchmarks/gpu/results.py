"""The file of all that was measured: written whole, kept by the name of the device, and what failed in it.

It holds `tiny`, and `parts`: of every part `about` (device and versions), `numbers` by measurement, `failed` (measurement ─► why),
`seconds`, `error` (why it did not end by itself, or null) and `log` (the end of what it said, where something went wrong).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "results"


def write_json(path: Path, content: Any) -> None:
    """Written aside and renamed, so that a file that is there is whole."""
    aside = path.with_suffix(".aside")
    aside.write_text(json.dumps(content, indent=1) + "\n")
    aside.replace(path)


def device_of(report: Mapping[str, Any]) -> str:
    """The device whose numbers these are; a part that never came to say so is passed over."""
    return next((part["about"]["device"] for part in report["parts"].values() if part["about"]), "no device")


def failures(report: Mapping[str, Any]) -> list[str]:
    """One line a measurement that failed, and one a part that did not end well by itself."""
    lines = []
    for name, part in report["parts"].items():
        lines += [f"{name}: {measurement}: {reason}" for measurement, reason in part["failed"].items()]
        if part["error"]:
            lines.append(f"{name}: {part['error']}")
    return lines


def keep(report: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Into results/<device>.json, beside what else is there: a part that was run again takes its old numbers' place."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{device_of(report).replace(' ', '-')}.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    write_json(path, found | report | {"parts": found.get("parts", {}) | report["parts"]})
    return path


def kept(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The reports of all devices so far; files of other benchmarks in the folder have no parts."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [report for report in found if "parts" in report]
