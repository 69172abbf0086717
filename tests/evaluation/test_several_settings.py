"""Runs of several settings in one comparison: a row each, named by the flags in which they differ."""

import pytest

from lavender_min.evaluation import compare, figures, names, report, tables
from lavender_min.tuning import runs
from lavender_min.tuning.flags import ModelFlags

PLAIN = [{"answers.all": 0.6, "pointing.all": 0.40}, {"answers.all": 0.7, "pointing.all": 0.42}]
LAVENDER = [{"answers.all": 0.5, "pointing.all": 0.60}, {"answers.all": 0.6, "pointing.all": 0.62}]


def test_settings_of_lavender_are_told_apart_by_their_flags(tmp_path):
    def finished(name, recipe="paper", rate=1e-4, seed=0, **flags):
        made = ModelFlags("host", **flags)
        decides = {"--learning_rate": rate, "--seed": seed, "the maps' recipe": recipe, "the examples": "4"}
        runs.remember(made, tmp_path / name, decides)
        return compare.Finished(report.Run(names.LAVENDER, str(tmp_path / name), {}, []), made)

    alike = [finished("a", lambda_att=3.0), finished("b", lambda_att=3.0, seed=1)]
    assert compare.by_setting(alike) == alike
    direct = {"aggregate": "layer-mean", "aligner": "none", "lambda_att": 3.0}
    several = compare.by_setting([*alike, finished("c", **direct), finished("d", trust="contrast", **direct)])
    long = "Lavender --aggregate layer-mean --aligner none"
    assert [run.report.name for run in several] == ["Lavender", "Lavender", long, f"{long} --trust contrast"]
    taught = compare.by_setting([finished("e", recipe="masks"), finished("f"), finished("g", rate=0.01)])
    assert [run.report.name for run in taught] == [
        "Lavender --learning_rate 0.0001 maps masks",
        "Lavender --learning_rate 0.0001 maps paper",
        "Lavender --learning_rate 0.01 maps paper",
    ]

    models = {names.PLAIN: PLAIN, names.LAVENDER: LAVENDER, names.LAVENDER + names.ALIGNED: LAVENDER, long: PLAIN}
    first, second = tables.differences_table(models).split("\n\n")
    assert " Lavender |" in first and "aggregate" not in first and f" {long} |" in second
    assert "+0.0 ± 0.0" in second and "-10.0 ± 0.0" in first
    shown = [run.report for run in several]
    colors = [figures.color_of(run.name, shown) for run in shown]
    assert len(set(colors)) == 3 and colors[0] == names.COLORS[names.LAVENDER]


def test_compared_runs_tuned_one_host_however_it_is_named(tmp_path, monkeypatch):
    def finished(vlm, **flags):
        return compare.Finished(report.Run(names.PLAIN, vlm, {}, []), ModelFlags(vlm, **flags))

    monkeypatch.chdir(tmp_path)
    of = [finished(name) for name in ("host", str(tmp_path / "host"), f"../{tmp_path.name}/host")]
    assert compare.base_of(of) is of[0].flags
    assert compare.base_of([finished("org/host"), finished("org/host")]).vlm == "org/host"
    for other in (finished("hosts"), finished("host", mode="full")):
        with pytest.raises(ValueError, match="tuned host by"):
            compare.base_of([other, of[0]])
