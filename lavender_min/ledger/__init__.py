"""The ledger: claims that are declared before they are run, the runs that answer them, and verdicts that are computed.

A claim compares *arms*. An arm is one way to tune a host, run once for each seed and host. Claims share the runs of an arm.

    experiments/   shared.toml: hosts, seeds, arms, how settings are chosen; and one file a claim: what would count for it
    declared.py    the declarations, read and checked
    plan.py        the runs that claims need, each known by a digest of all that decides its result, and how long they take
    stores.py      the maps that runs are trained with and measured against
    parts.py       hosts put together anew from the parts of a shipped one
    measures.py    what is measured of a tuned host
    runs.py        the runs, spread over processes
    verdicts.py    holds, does not hold, not clear
    report.py, figures.py   docs/claims.md and its pictures

    python -m lavender_min.ledger run --processes 2      all that is missing; stopped or killed, it goes on where it was
    python -m lavender_min.ledger report                 the page and the pictures, from what is there
"""
