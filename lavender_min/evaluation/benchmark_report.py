"""What lmms-eval measured: as a table, as JSON, and as bars like those of the paper's Fig. 15."""

import json
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from lavender_min.evaluation.benchmark_names import PAPER, measures_of
from lavender_min.evaluation.intervals import interval
from lavender_min.evaluation.names import COLORS, LAVENDER, PLAIN
from lavender_min.evaluation.tables import table
from lavender_min.failing import naming, read_json, shaped

TITLES = {one.task: one.title for one in PAPER if one.task}
EXPLAINED = (
    "Scores are lmms-eval's, in its own units. In brackets: the benchmark's own standard error, over its questions, where it gives "
    "one. After ±: the 95 % interval over runs (Student's t), where there are several. Relative: (Lavender − plain tuning) / plain "
    "tuning, ± its standard error; both models' errors count as independent though the questions are the same, so it is rather "
    "too wide."
)


class Score(NamedTuple):
    value: float
    # The benchmark's own standard error; None where it gives none.
    error: float | None


# {row of the table: score}. A row is a benchmark, or one of its measures where it has several.
Scores = dict[str, Score]


class Relative(NamedTuple):
    """How much better Lavender is than plain tuning, as a share of plain tuning's score."""

    gain: float
    # Its standard error; None where a score has none.
    error: float | None


def read_scores(file: Path, task: str) -> Scores:
    """The scores in a JSON of lmms-eval. A group of tasks has an entry for each of its subtasks.

    Of the paper's benchmarks, the measures that the paper reports are taken; of any other task, the first. Raises ValueError, in
    one line that names the file, if there is no score.
    """
    with naming(file):
        held = read_json(file, dict)
        results = shaped(held.get("results"), dict[str, dict[str, Any]], f"{file}, results")
        found: Scores = {}
        for entry, values in results.items():
            # Keys are "<measure>,<filter>" and "<measure>_stderr,<filter>".
            numbers = {key.split(",")[0]: value for key, value in values.items() if is_number(value)}
            measures = [name for name in numbers if "_stderr" not in name]
            wanted = [name for name in measures_of(task) if name in measures] or measures[:1]
            for name in wanted:
                row = TITLES.get(entry, entry) + (f", {name}" if len(wanted) > 1 else "")
                found[row] = Score(float(numbers[name]), numbers.get(f"{name}_stderr"))
    if not found:
        raise ValueError(f"{file} holds no score of {task}")
    return found


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def mean(scores: list[Score]) -> Score:
    """The mean score of some runs, and their mean standard error, None if one has none.

    That error is over questions. It is not divided by √runs, because all runs answer the same questions.
    """
    errors = [score.error for score in scores if score.error is not None]
    error = statistics.fmean(errors) if len(errors) == len(scores) else None
    return Score(statistics.fmean(score.value for score in scores), error)


def relative(plain: Score, lavender: Score) -> Relative | None:
    """(L − P) / |P| of Lavender's score L and plain tuning's P; None where P is 0.

    Its standard error follows from theirs by error propagation: √(σ_L² + (L/P)² σ_P²) / |P|.
    """
    if plain.value == 0:
        return None
    ratio = lavender.value / plain.value
    error = None
    if plain.error is not None and lavender.error is not None:
        error = math.hypot(lavender.error, ratio * plain.error) / abs(plain.value)
    return Relative((lavender.value - plain.value) / abs(plain.value), error)


def spell(scores: list[Score]) -> str:
    """ "0.375 (0.078)": the mean, and its standard error in brackets. Several runs give "0.6 ± 1.3 (0.03)"; none give "–"."""
    if not scores:
        return "–"
    value, error = mean(scores)
    half = interval([score.value for score in scores]).half
    parts = [f"{value:.4g}", f"± {half:.2g}" if half is not None else "", f"({error:.2g})" if error is not None else ""]
    return " ".join(filter(None, parts))


def write(out: Path, scores: dict[str, list[Scores]], models: list[dict[str, Any]], command: str) -> str:
    """Writes benchmarks.md, benchmarks.json and benchmarks.png into the folder `out`, and returns the table.

    `scores` is {name of a model: the scores of each of its runs}. The picture is left out where nothing can be compared.
    """
    rows = list(dict.fromkeys(row for runs in scores.values() for run in runs for row in run))
    of_row = {row: {name: [run[row] for run in runs if row in run] for name, runs in scores.items()} for row in rows}
    gains = {row: relative(mean(of[PLAIN]), mean(of[LAVENDER])) for row, of in of_row.items()
             if of.get(PLAIN) and of.get(LAVENDER)}  # fmt: skip
    drawn = {row: gain for row, gain in gains.items() if gain is not None}
    header = ["benchmark", *scores, *(["relative, %"] if gains else [])]
    lines = []
    for row, of in of_row.items():
        gain = drawn.get(row)
        error = "" if gain is None or gain.error is None else f" ± {100 * gain.error:.1f}"
        last = "–" if gain is None else f"{100 * gain.gain:+.1f}{error}"
        lines.append([row, *(spell(of[name]) for name in scores), *([last] if gains else [])])
    text = table(header, lines)
    out.mkdir(parents=True, exist_ok=True)
    picture = "![relative improvement](benchmarks.png)" if drawn else ""
    parts = ["# Benchmarks", text, EXPLAINED, picture, f"```\n{command}\n```"]
    (out / "benchmarks.md").write_text("\n\n".join(filter(None, parts)) + "\n")
    content = {
        "command": command,
        "models": models,
        "scores": {
            name: [{row: score._asdict() for row, score in run.items()} for run in runs]
            for name, runs in scores.items()
        },
        "relative": {row: gain and gain._asdict() for row, gain in gains.items()},
    }
    (out / "benchmarks.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    if drawn:
        draw_bars(out / "benchmarks.png", drawn)
    return text


def draw_bars(path: Path, gains: dict[str, Relative]) -> None:
    """A bar for each row of the table, in percent. Its whiskers are one standard error long, each way."""
    figure = Figure(figsize=(6.4, 0.9 + 0.34 * len(gains)), layout="constrained")
    axis = figure.subplots()
    rows = list(gains)[::-1]
    values = [100 * gains[row].gain for row in rows]
    axis.barh(rows, values, color=COLORS[LAVENDER], height=0.65)
    for place, row in enumerate(rows):
        if (error := gains[row].error) is not None:
            axis.errorbar(values[place], place, xerr=100 * error, color="#333333", capsize=2.5, lw=1)
    axis.axvline(0, color="#333333", lw=0.8)
    axis.set_xlabel("(Lavender − plain tuning) / plain tuning, %")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="x", alpha=0.25)
    axis.set_axisbelow(True)
    figure.savefig(path, dpi=150)
