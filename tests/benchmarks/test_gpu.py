"""`make gpu` before there is a GPU: the whole of it in small, and what becomes of it when a part fails, hangs or dies."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from gpu import cases, kernels, results, right, runner, stage1, table, whole
from gpu.record import PACKAGES, Record

from lavender_min import ops

GPU = ROOT / "tests/benchmarks/gpu"


@pytest.fixture
def record(tmp_path):
    return Record(tmp_path / "part.json", 60, tiny=True)


def test_the_tiny_run(tmp_path):
    """Every part, and every number that the README's table needs; nothing is kept of it."""
    before = sorted(results.RESULTS.iterdir())
    command = [sys.executable, str(GPU), "--tiny", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["tiny"] and list(report["parts"]) == list(runner.PARTS) and results.failures(report) == []
    drawn = table.draw([report])
    assert table.NOTHING not in drawn and drawn in done.stdout
    for part in report["parts"].values():
        assert part["about"]["torch"] == torch.__version__ and part["error"] is None
        assert {*PACKAGES, "device", "cuda", "driver", "commit", "date"} <= part["about"].keys()
    assert sorted(results.RESULTS.iterdir()) == before
    assert {path.name for path in tmp_path.iterdir()} == {"gpu.json", "log.txt"}


# --- the runner -------------------------------------------------------------------------------------------------------

PARTS = {
    "broken": "def run(record):\n    record.add('first', x=1)\n    raise TypeError('on purpose')\n",
    "slow": "import time\ndef run(record):\n    record.add('first', x=2)\n    record.fail('second', 'bad')\n    time.sleep(60)\n",
    "dead": "import os, signal\ndef run(record):\n    record.add('first', x=3)\n    os.kill(os.getpid(), signal.SIGSEGV)\n",
    "partly": "def run(record):\n    with record.trying('bad'):\n        1 / 0\n    record.add('good', x=4)\n",
    "good": "def run(record):\n    record.add('first', x=5)\n",
}


def test_a_part_that_fails_hangs_or_dies_does_not_stop_the_others(tmp_path, monkeypatch, capfd):
    for name, code in PARTS.items():
        (tmp_path / f"{name}_part.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    # The slow part gets 13 s of the 600: enough to start in, too little for a minute's sleep.
    parts = {name: runner.Part(f"{name}_part", 1 if name == "slow" else 15) for name in PARTS}
    report = runner.run_parts(parts, tmp_path / "out", 600, tiny=True)
    assert report == json.loads((tmp_path / "out/gpu.json").read_text())
    parts = report["parts"]
    known = {name: part["numbers"].get("first") for name, part in parts.items()}
    assert known == {"broken": {"x": 1}, "slow": {"x": 2}, "dead": {"x": 3}, "partly": None, "good": {"x": 5}}
    assert parts["partly"]["numbers"] == {"good": {"x": 4}}
    assert parts["broken"]["failed"] == {"the part as a whole": "TypeError: on purpose"}
    assert "raise TypeError('on purpose')" in parts["broken"]["log"] and "on purpose" not in parts["slow"]["log"]
    assert parts["slow"]["error"].startswith("ended at its limit of") and parts["slow"]["seconds"] < 30
    assert parts["dead"]["error"] == "ended by SIGSEGV" and parts["good"]["error"] is None
    assert results.failures(report) == [
        "broken: the part as a whole: TypeError: on purpose",
        "slow: second: bad",
        f"slow: {parts['slow']['error']}",
        "dead: ended by SIGSEGV",
        "partly: bad: ZeroDivisionError: division by zero",
    ]
    capfd.readouterr()


def test_a_failure_shows_at_the_end_and_in_the_exit_status(tmp_path, monkeypatch, capsys):
    failed = {"about": {"device": "a card"}, "numbers": {}, "failed": {"x": "bad"}, "error": None}
    monkeypatch.setattr(runner, "run_parts", lambda parts, *_: {"tiny": True, "parts": dict.fromkeys(parts, failed)})
    assert runner.main(["--tiny", "--only", "stage2", "right", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().out.endswith("failed:\nright: x: bad\nstage2: x: bad\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_at_once(capsys):
    assert runner.main([]) == 2
    assert "make gpu TINY=1" in capsys.readouterr().err


def test_parts_a_to_d_need_neither_pyarrow_nor_datasets_nor_pytest():
    """A name that is None in sys.modules is, to whoever imports it or looks for it, not installed."""
    code = f"""
import sys
sys.path[:0] = [{str(GPU.parent)!r}, {str(GPU.parents[1])!r}, {str(ROOT)!r}]
sys.modules.update(dict.fromkeys(("pyarrow", "datasets", "hypothesis", "pytest", "pydantic")))
import gpu.{", gpu.".join(name for name in runner.PARTS if name != "whole")}
from gpu.stage1 import small
small()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- results and the README -------------------------------------------------------------------------------------------


def report_of(device: str, **numbers) -> dict:
    about = {"device": device}
    return {"tiny": False, "parts": {part: {"about": about, "numbers": found} for part, found in numbers.items()}}


def test_results_are_kept_by_device_and_part(tmp_path):
    path = tmp_path / "NVIDIA-X.json"
    path.write_text('{"step": "of another benchmark"}')
    (tmp_path / "cpu.json").write_text('{"step": "of another benchmark"}')
    assert results.kept(tmp_path) == []
    assert results.keep(report_of("NVIDIA X", right={"all": 1}, stage1={"paper": 1}), tmp_path) == path
    results.keep(report_of("NVIDIA X", stage1={"paper": 2}), tmp_path)
    (report,) = results.kept(tmp_path)
    assert [part["numbers"] for part in report["parts"].values()] == [{"all": 1}, {"paper": 2}]
    assert report["step"] == "of another benchmark"


def test_the_readme_shows_what_is_measured():
    readme = table.README.read_text()
    assert table.put(readme, table.draw(results.kept())) == readme, "run `make results`"


def test_what_was_measured_elsewhere_comes_into_the_readme(tmp_path):
    readme, report = tmp_path / "README.md", report_of("NVIDIA X", right={"all": {"right": 3, "cases": 4}})
    readme.write_text(table.README.read_text())
    (tmp_path / "gpu.json").write_text(json.dumps(report))
    table.main([str(tmp_path / "gpu.json")], readme, tmp_path / "results")
    assert "| kernels that are right | 3 of 4 cases |" in readme.read_text() and "|  | NVIDIA X |" in readme.read_text()
    (tmp_path / "gpu.json").write_text(json.dumps(report | {"tiny": True}))
    with pytest.raises(ValueError, match="TINY=1"):
        table.main([str(tmp_path / "gpu.json")], readme, tmp_path / "results")


def test_cells_without_a_measurement_say_so():
    stage1 = {"noise, compiled": {"skipped": "no time left"}}
    report = report_of("A", right={"all": {"right": 3, "cases": 4}}, stage1=stage1)
    rows = [row.split(" | ") for row in table.draw([report, report_of("B")]).splitlines()]
    assert rows[0][1:] == ["A", "no device |"]
    assert rows[2][1:] == ["3 of 4 cases", f"{table.NOTHING} |"]
    assert all(row[1:] == [table.NOTHING, f"{table.NOTHING} |"] for row in rows[3:])
    with pytest.raises(ValueError, match="once each"):
        table.put("a README without marks", "")


# --- the parts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shift, repeats, fine", [(0, True, True), (1e-3, True, False), (math.nan, True, False), (0, False, False)]
)
def test_a_wrong_kernel_is_found(monkeypatch, shift, repeats, fine):
    calls = []

    def ways(dtype, sizes):
        def kernel(x):
            calls.append(0)
            return x * 2 + shift + (0 if repeats else 1e-7 * len(calls))

        return cases.Ways(kernel, lambda x: x * 2, [torch.linspace(0, 1, 7)])

    monkeypatch.setitem(cases.WAYS, "double", ways)
    found = right.check(cases.Case("double", "float32", "usual", None))
    assert found["right"] is fine and found["twice"] is (repeats and not math.isnan(shift))


def test_eager_word_attention_is_the_specification():
    """What the kernel is compared with on the day, against the op's own reference today."""
    for mask in ("none", *cases.MASKS):
        ways = cases.word_ways(torch.float64, cases.TINY["word_attention"]._replace(mask=mask))
        inputs = [x.double() for x in ways.inputs]
        expected = ops.word_attention(*inputs, backend="torch", **{k: v for k, v in ways.eager.keywords.items()})
        torch.testing.assert_close(ways.eager(*inputs), expected, check_dtype=False, atol=1e-6, rtol=1e-6)


def test_all_cases_of_the_real_run_can_be_made(monkeypatch):
    found = cases.cases(tiny=False)
    assert len({(case.op, case.dtype, case.what) for case in found}) == len(found) > 150
    assert {case.sizes.d for case in found if case.op == "word_attention"} == set(cases.HEAD_DIMS)
    for case in found:
        if case.dtype == "float32" and "Llama" not in case.what:
            cases.WAYS[case.op](torch.float32, case.sizes)


@pytest.mark.parametrize(
    "said, wrong", [("ERROR SUMMARY: 0 errors", False), ("ERROR SUMMARY: 2 errors", True), ("", True)]
)
def test_the_sanitizer_is_understood(tmp_path, monkeypatch, said, wrong):
    binary = tmp_path / "compute-sanitizer"
    lines = ("COMPUTE-SANITIZER", "Invalid read", said)
    binary.write_text("#!/bin/sh\n" + "".join(f"echo '========= {line}'\n" for line in lines))
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    started = right.sanitizer("memcheck")
    if wrong:
        with pytest.raises(RuntimeError, match="2 errors, first Invalid read" if said else "no summary, exit status 0"):
            right.verdict(started, 30)
    else:
        assert right.verdict(started, 30) == {"errors": 0}


def test_blocks_that_will_not_do_drop_out(record, monkeypatch):
    wanted, tried = [torch.ones(3)], []

    def once(_):
        def call():
            blocks = kernels.word_attention.blocks(2, 1, 16, torch.float32)
            tried.append(blocks)
            if blocks["BX"] == 128:
                raise RuntimeError("out of shared memory")
            return [wanted[0] + (1e-2 if blocks["BX"] == 64 else 0)]

        return call

    monkeypatch.setattr(kernels, "once", once)
    monkeypatch.setattr(kernels, "milliseconds", lambda _: 5.0 - tried[-1]["num_warps"] - tried[-1]["BX"] / 100)
    kernels.search(record, {"h": 2, "hkv": 1, "d": 16}, {"BX": (8, 64, 128), "num_warps": (1, 2)})
    code = record.numbers["blocks in the code"]["blocks"]
    reasons = [row["dropped"] for row in record.numbers.values() if "dropped" in row]
    assert reasons == ["gives other numbers", "RuntimeError: out of shared memory"]
    assert record.numbers["blocks"]["blocks"] == code  # the others tried are slower


def test_full_size_is_v1_4s(monkeypatch):
    monkeypatch.setattr(stage1, "DEVICE", "meta")
    sd = stage1.full_size()
    parts = {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}
    assert {name: sum(p.numel() for p in getattr(sd, name).parameters()) for name in parts} == parts
    assert sd.side == 512 and sd.map_sides == [64, 32, 16, 8] and sd.tokenizer.model_max_length == 77


def test_the_demo_is_what_the_script_runs():
    commands = whole.demo_commands("here")
    assert [command[0] for command in commands] == ["extract.py", *["train.py"] * 3, "evaluate.py"]
    for command, name in zip(commands[1:4], whole.RUNS, strict=True):
        assert f"here/{name}" in command and ("--plain" in command) == (name == "plain-0")
    short = whole.shortened(commands, steps=3, batch=4)
    assert [command[0] for command in short] == ["extract.py", *["train.py"] * 3, "extract.py", "evaluate.py"]
    for whole_one, short_one in zip(commands, short[:4] + short[5:], strict=True):
        assert short_one[: len(whole_one)] == whole_one and len(short_one) > len(whole_one)


def test_losses_that_differ_are_a_failure(record):
    whole.compare(record, "a run", [1.0, 3.0], [1.005, 2.0])
    assert not record.failed and record.numbers["a run, device and CPU"]["most_apart"] == 0.5
    whole.compare(record, "a run", [1.0, 2.0], [1.02, 2.0])
    assert record.failed == {"a run, device and CPU": "the first losses are 1.0000 and 1.0200"}


def test_without_the_store_s_packages_the_whole_is_skipped(record, monkeypatch):
    monkeypatch.setattr(whole.importlib.util, "find_spec", lambda name: None)
    whole.run(record)
    assert record.numbers == {"demo": {"skipped": "pyarrow and datasets not installed"}} and not record.failed
