"""What a folder must hold to be taken for a finished run."""

import json
from dataclasses import asdict

import pytest

from lavender_min.evaluation import compare
from lavender_min.evaluation.names import PLAIN
from lavender_min.tuning.flags import ModelFlags


@pytest.mark.parametrize(
    ("file", "held"),
    [
        ("trainer_state.json", "null"),
        ("trainer_state.json", "{}"),
        ("trainer_state.json", '{"log_history": 5}'),
        ("trainer_state.json", '{"log_his'),
        ("lavender.json", "{}"),
        ("lavender.json", '{"vlm": "x", "lora_r": "8"}'),
        ("lavender.json", '{"vlm": "x", "lambda_att": -1}'),
    ],
)
def test_a_run_whose_files_are_not_as_written_is_named(tmp_path, file, held):
    (tmp_path / "lavender.json").write_text(json.dumps(asdict(ModelFlags("x", plain=True))))
    (tmp_path / "trainer_state.json").write_text('{"log_history": []}')
    assert compare.recall(PLAIN, str(tmp_path)).flags.vlm == "x"
    (tmp_path / file).write_text(held)
    with pytest.raises(ValueError, match=f"{tmp_path}/{file}"):
        compare.recall(PLAIN, str(tmp_path))


def test_what_pairs_were_made_with_is_read_as_a_list(tmp_path):
    (tmp_path / "seeds.json").write_text("5")
    with pytest.raises(ValueError, match="seeds.json, the whole: input should be a valid list; got 5"):
        compare.check_pairs(compare.Flags(seeds=1), tmp_path)
