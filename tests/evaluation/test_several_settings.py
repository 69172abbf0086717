"""Runs of several settings in one comparison: a row each, named by the flags in which they differ."""

from lavender_min.evaluation import compare, figures, names, report, tables
from lavender_min.tuning.flags import ModelFlags

PLAIN = [{"answers.all": 0.6, "pointing.all": 0.40}, {"answers.all": 0.7, "pointing.all": 0.42}]
LAVENDER = [{"answers.all": 0.5, "pointing.all": 0.60}, {"answers.all": 0.6, "pointing.all": 0.62}]


def test_settings_of_lavender_are_told_apart_by_their_flags():
    def finished(name, **flags):
        made = ModelFlags("host", **flags)
        return compare.Finished(report.Run(names.LAVENDER, name, {}, []), made)

    alike = [finished("a", lambda_att=3.0), finished("b", lambda_att=3.0)]
    assert compare.by_setting(alike) == alike
    direct = {"aggregate": "layer-mean", "aligner": "none", "lambda_att": 3.0}
    several = compare.by_setting([*alike, finished("c", **direct), finished("d", trust="contrast", **direct)])
    long = "Lavender --aggregate layer-mean --aligner none"
    assert [run.report.name for run in several] == ["Lavender", "Lavender", long, f"{long} --trust contrast"]

    models = {names.PLAIN: PLAIN, names.LAVENDER: LAVENDER, names.LAVENDER + names.ALIGNED: LAVENDER, long: PLAIN}
    first, second = tables.differences_table(models).split("\n\n")
    assert " Lavender |" in first and "aggregate" not in first and f" {long} |" in second
    assert "+0.0 ± 0.0" in second and "-10.0 ± 0.0" in first
    runs = [run.report for run in several]
    colors = [figures.color_of(run.name, runs) for run in runs]
    assert len(set(colors)) == 3 and colors[0] == names.COLORS[names.LAVENDER]
