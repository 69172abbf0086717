"""docs/claims.md: what was claimed, what came out, and the verdict. Only the text between two marks in that file is rewritten."""

from pathlib import Path
from typing import Any, NamedTuple

from lavender_min.evaluation.intervals import interval
from lavender_min.evaluation.names import MEASURES, SPELLED, Measure
from lavender_min.evaluation.tables import table
from lavender_min.ledger import figures, verdicts
from lavender_min.ledger.declared import Claim
from lavender_min.ledger.plan import best_of, is_there
from lavender_min.ledger.runs import Ledger
from lavender_min.ledger.verdicts import Contrast, Verdict

BEGIN, END = "<!-- ledger: written by python -m lavender_min.ledger report -->", "<!-- ledger: end -->"
# Measures of the ledger's own, beside those of `evaluation`.
OWN = {
    "kl": Measure("KL to the mask", "nats", 1, 3, -1),
    "gap": Measure("gap between picture and text, first layers", "", 1, 2, -1),
    "lost": Measure("language lost", "nats a token", 1, 3, -1),
    "loss": Measure("loss of captions", "nats a token", 1, 3, -1),
}
# Splits as the headings of tables name them; "" for the one that most numbers are of.
SPLITS = {
    "crowd_test": "",
    "crowd_pairs": "new pairs",
    "crowd_more": "more things",
    "crowd_words": "other words",
    "crowd_ground": "other background",
    "pretrained": "what was pretrained",
}


class Judged(NamedTuple):
    contrast: Contrast
    # {host: verdict}; None where runs are missing.
    by_host: dict[str, Verdict | None]


def write(ledger: Ledger, page: Path) -> None:
    """Writes the page, and the figures into claims/ beside it. Raises ValueError for a page without the two marks."""
    drawn = figures.draw_all(ledger, page.parent / "claims")
    text = page.read_text(encoding="utf-8") if page.exists() else f"# Claims\n\n{BEGIN}\n{END}\n"
    if BEGIN not in text or END not in text:
        raise ValueError(f"{page} must hold the lines {BEGIN!r} and {END!r}, between which the ledger writes")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(f"{before}{BEGIN}\n\n{generated(ledger, drawn)}\n\n{END}{after}", encoding="utf-8")
    print(f"{page} and {len(drawn)} figures beside it are written")


def judged(ledger: Ledger, claim: Claim) -> list[Judged]:
    """The verdict of each contrast of a claim, on each of its hosts that is shipped."""
    rows = []
    for contrast in claim.contrasts:
        by_host: dict[str, Verdict | None] = {}
        for host in filter(is_there, claim.hosts):
            found = ledger.numbers(host, claim.needed)
            there = set(found) >= {*contrast.plus, *contrast.minus}
            by_host[host] = verdicts.judge(contrast, found) if there else None
        rows.append(Judged(contrast, by_host))
    return rows


def verdict_of(ledger: Ledger, claim: Claim, rows: list[Judged]) -> str:
    """What the page says of the whole claim: its verdict, and of how many seeds while some are missing; "not run" without one."""
    found = [verdict for row in rows for verdict in row.by_host.values()]
    complete = [verdict for verdict in found if verdict is not None]
    if not found or len(complete) < len(found):
        return "not run"
    run = min(len(runs) for host in rows[0].by_host for runs in ledger.numbers(host, claim.needed).values())
    seeds = len(ledger.setup.seeds)
    return verdicts.together(complete) + ("" if run == seeds else f" ({run} of {seeds} seeds so far)")


# ------------------------------------------------------------------------------------------------------------ text


def generated(ledger: Ledger, drawn: dict[Path, str]) -> str:
    """All that stands between the marks."""
    rows = {claim.number: judged(ledger, claim) for claim in ledger.claims}
    words = {claim.number: verdict_of(ledger, claim, rows[claim.number]) for claim in ledger.claims}
    effects = [verdict for of in rows.values() for row in of for verdict in row.by_host.values() if verdict]
    overview = [[f"{claim.number}. {claim.title}", claim.paper, words[claim.number]] for claim in ledger.claims]
    parts = [
        "## The verdicts",
        f"Written by `ledger/report.py` from the runs; nobody edits a verdict. An effect is a mean over {len(ledger.setup.seeds)} "
        "seeds ± half its 95 % interval, of pairs of runs that share the seed. *Does not hold*: the whole interval lies below the "
        "smallest effect that was declared to matter. *Holds*: the whole interval lies above 0, in favour of the claim, and "
        f"reaches that effect. *Not clear*: all else. {len(effects)} effects are judged; of those that do not exist, one in 40 "
        "lies above 0 by chance.",
        table(["claim", "what of the paper it answers", "verdict"], overview),
        about(ledger),
        *(section(ledger, claim, rows[claim.number], words[claim.number]) for claim in ledger.claims),
    ]
    if drawn:
        parts += [
            "## Figures",
            *(f"{caption}\n\n![{file.stem}](claims/{file.name})" for file, caption in drawn.items()),
        ]
    return "\n\n".join(parts)


def about(ledger: Ledger) -> str:
    """A list: how much was run, by which commits, with which seeds and hosts, and what was chosen."""
    runs = [result for run in ledger.known_plan().runs.values() if (result := ledger.result(run))]
    commits = sorted({result["commit"] for result in runs})
    hours = sum(result["seconds"]["all"] for result in runs) / 3600
    lines = [
        f"{len(runs)} of {len(ledger.whole_plan().runs)} runs, {hours:.1f} hours of all processes together, "
        f"commit {', '.join(commits) or '–'}; seeds {', '.join(map(str, ledger.setup.seeds))}."
    ]
    best = best_of(ledger.setup, ledger.result)
    for host, kind in ledger.setup.hosts.items():
        if not is_there(host):
            lines.append(f"The host `{host}` ({kind}) does not ship yet, so nothing was run on it.")
            continue
        chosen = {name: best(name, host) for name in ledger.setup.choices}
        said = [f"{ledger.setup.choices[name].about}: {spelled(flags)}" for name, flags in chosen.items() if flags]
        if said:
            lines.append(f"Chosen on {next(iter(ledger.setup.validation))} for `{host}`: " + "; ".join(said) + ".")
    return "\n".join(f"- {line}" for line in lines)


def spelled(flags: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in flags.items())


def section(ledger: Ledger, claim: Claim, rows: list[Judged], word: str) -> str:
    """One claim: its verdict, its contrasts, and for each host a table of its arms."""
    parts = [
        f"### {claim.number}. {claim.title}",
        f"{claim.paper}. **{word[0].upper()}{word[1:]}.** {claim.note}".strip(),
    ]
    hosts = [host for host in claim.hosts if is_there(host)]
    effects = [[row.contrast.what, *(effect(row.contrast, row.by_host[host]) for host in hosts)] for row in rows]
    parts.append(table(["what would count, by how much", *hosts], effects))
    for host in hosts:
        found = ledger.numbers(host, claim.needed)
        if found:
            parts += [arms_table(ledger, claim, host, found), bound(claim, host, found)]
    return "\n\n".join(filter(None, parts))


def effect(contrast: Contrast, verdict: Verdict | None) -> str:
    """ "+10 ± 2.5 (matters from 2): holds", in the unit of the contrast's measures."""
    if verdict is None:
        return "not run"
    scale = 1.0 if contrast.of == "correlation" else measure_of(contrast.measures[0]).scale
    # Rounded, because the difference of equal means is ±1e-15 or so.
    mean, half = (value if value is None else round(value * scale, 6) + 0.0 for value in verdict.effect)
    return f"{mean:+.3g}{'' if half is None else f' ± {half:.2g}'} (matters from {contrast.margin * scale:g}): {verdict.word}"


def measure_of(name: str) -> Measure:
    """How the numbers of "crowd_test/aligned.mse.own" are printed: those of the measure "mse"."""
    measure = name.partition("/")[2].removeprefix("aligned.").partition(".")[0]
    return {**MEASURES, **OWN}[measure]


def heading(name: str) -> str:
    """ "pointing game, % (new pairs, colour)" for "crowd_pairs/pointing.color"."""
    split, _, rest = name.partition("/")
    aligned, of = rest.startswith("aligned."), rest.removeprefix("aligned.").partition(".")[2]
    measure = measure_of(name)
    title = f"{measure.title}{' ratio' if of == 'ratio' else ''}{', ' + measure.unit if measure.unit else ''}"
    notes = [
        SPLITS.get(split, split),
        "through the Aligner" if aligned else "",
        "" if of in ("all", "ratio") else SPELLED.get(of, of),
    ]
    said = ", ".join(filter(None, notes))
    return f"{title} ({said})" if said else title


def arms_table(ledger: Ledger, claim: Claim, host: str, found: dict[str, list[dict[str, float]]]) -> str:
    """A row for each arm that was run, a column for each measure that the claim shows."""
    rows = []
    for arm in claim.needed:
        if arm in found:
            cells = [cell(name, [run[name] for run in found[arm] if name in run]) for name in claim.shown]
            rows.append([ledger.setup.arms[arm].about, *cells])
    return table([host, *map(heading, claim.shown)], rows)


def cell(name: str, values: list[float]) -> str:
    """The mean of a measure over seeds ± half its 95 % interval; "–" for an arm that has no such number."""
    if not values:
        return "–"
    _, _, scale, digits, _ = measure_of(name)
    mean, half = interval(values)
    return f"{mean * scale:.{digits}f}" + ("" if half is None else f" ± {half * scale:.{digits}f}")


def bound(claim: Claim, host: str, found: dict[str, list[dict[str, float]]]) -> str:
    """A sentence if even exact masks gain no answers for sure, as then no other teacher can be expected to; else ""."""
    answers = [name for name in claim.shown if name.endswith("/answers.all")]
    if not answers or not {claim.oracle, claim.plain} <= set(found):
        return ""
    contrast = Contrast("", [claim.oracle], [claim.plain], answers[:1])
    gain = verdicts.judge(contrast, found)
    mean, half = gain.effect
    if gain.word == verdicts.HOLDS or half is None:
        return ""
    split = answers[0].partition("/")[0]
    return (
        f"Even exact masks gain no answers on `{host}` that these seeds can show ({100 * mean:+.1f} ± {100 * half:.1f} points on "
        f"{split}), so no other teacher can be expected to show a gain there."
    )
