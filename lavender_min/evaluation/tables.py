"""The measured numbers as Markdown tables that also read well as plain text.

`models` is {name of a model: its runs} throughout.
"""

from collections.abc import Sequence

from lavender_min.evaluation.intervals import differences, interval
from lavender_min.evaluation.names import (
    MEASURES,
    MSE_TITLES,
    PLAIN,
    PLURAL,
    SPELLED,
    Numbers,
    settings,
    spell,
    title,
)

Models = dict[str, list[Numbers]]


def table(header: list[str], rows: list[list[str]]) -> str:
    """The first column is set to the left, the others to the right."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]

    def line(cells: list[str]) -> str:
        padded = [c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])


def models_table(models: Models, first: str, columns: dict[str, str]) -> str:
    """One row a model; `columns` is {key: title}. Models that have none of these numbers are left out."""
    rows = []
    for name, runs in models.items():
        if any(key in runs[0] for key in columns):
            cells = [spell(k, *interval([run[k] for run in runs])) if k in runs[0] else "–" for k in columns]
            rows.append([name, *cells])
    return table([first, *columns.values()], rows)


def keys_of(models: Models, measure: str) -> list[str]:
    """All keys of one measure that some model has, "….all" last."""
    keys = dict.fromkeys(key for runs in models.values() for key in runs[0] if key.startswith(measure + "."))
    return sorted(keys, key=lambda key: key.endswith(".all"))


def main_columns(models: Models) -> dict[str, str]:
    """The columns of the main table. Of the kinds of words the first stands there; the others have tables of their own."""
    (first, *_) = keys_of(models, "pointing")
    kind = first.split(".")[1]
    return {
        "answers.all": "answers, %",
        first: f"pointing: {PLURAL.get(kind, kind)}, %",
        "pointing.all": "pointing: all, %",
        "mass.all": "mass inside, %",
        "entropy.all": "entropy, nats",
        **MSE_TITLES,
    }


def main_table(models: Models) -> str:
    return models_table(models, "", main_columns(models))


def measure_table(models: Models, measure: str) -> str:
    """Every kind of word (or question) of one measure."""
    kinds = {key: key.split(".")[1] for key in keys_of(models, measure)}
    header = f"{MEASURES[measure].title}, {MEASURES[measure].unit}"
    return models_table(models, header, {key: SPELLED.get(kind, kind) for key, kind in kinds.items()})


def differences_table(models: Models, only: Sequence[str] = ()) -> str:
    """Lavender − plain tuning, for all measures or `only` some, a table a setting; "" where there are no pairs to compare."""
    found = []
    for lavender in settings(models):
        rows = []
        for key, d in differences(models.get(PLAIN, []), models[lavender]).items():
            if key in only or not only:
                both = [spell(key, *interval([run[key] for run in models[name]])) for name in (PLAIN, lavender)]
                excludes = "one pair" if d.excludes_zero is None else "yes" if d.excludes_zero else "no"
                rows.append([title(key), *both, spell(key, d.mean, d.half, sign=True), excludes, d.winner or "–"])
        if rows:
            found.append(table(["", PLAIN, lavender, "difference", "interval excludes 0", "better"], rows))
    return "\n\n".join(found)
