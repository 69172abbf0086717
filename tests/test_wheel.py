"""The wheel, in a fresh environment and from another folder: the three commands are there and do the toy world's work."""

import os
import subprocess
import sys
import sysconfig
import venv

import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A new environment with the wheel. It finds the dependencies where these tests do, but not this checkout."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    [site] = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    wheels = tmp_path_factory.mktemp("wheels")
    # A copy, so that the build leaves nothing in the checkout.
    copy = tmp_path_factory.mktemp("copy") / "lavender-min"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(copy)], check=True)
    pip = [sys.executable, "-m", "pip", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", str(wheels), str(copy)], check=True)
    [wheel] = wheels.glob("*.whl")
    subprocess.run([*pip, "--python", str(folder / "bin/python"), "install", "--no-deps", str(wheel)], check=True)
    return folder


@pytest.fixture
def run(environment, tmp_path):
    def command(name, *words):
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = subprocess.run(
            [str(environment / "bin" / name), *words],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=300,
        )
        return done

    return command


@pytest.mark.slow
def test_the_package_is_the_wheels(run, environment):
    done = run(
        "python",
        "-c",
        "import lavender_min, lavender_min.kernels.shapes as k; print(lavender_min.__file__, k.__file__)",
    )
    assert done.stdout.count(str(environment)) == 2, done.stdout + done.stderr


@pytest.mark.slow
def test_the_three_stages_run_from_another_folder(run, tmp_path):
    recipe = "--recipe noise --timesteps 151 --resolutions 16:1"
    done = run("lavender-extract", "--data", "toy", "--limit", "8", *recipe.split())
    assert done.returncode == 0 and "8 pictures stored in maps/toy" in done.stdout, done.stderr
    steps = ["--max_steps", "2", "--per_device_train_batch_size", "4", "--disable_tqdm", "true"]
    for more in ([], ["--plain"]):
        done = run("lavender-train", "--data", "toy", "--qlora", "--limit", "8", "--match", "all", *more, *steps)
        assert done.returncode == 0 and "are in runs/toy-" in done.stdout, done.stderr
    folders = ["--plain", "runs/toy-plain", "--lavender", "runs/toy-qlora", "--out", "report"]
    done = run("lavender-evaluate", "--scenes", "1", "--extract", recipe, *folders)
    assert done.returncode == 0 and (tmp_path / "report" / "report.json").exists(), done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lavender-extract", "lavender-train", "lavender-evaluate"])
def test_help_is_there(run, name):
    done = run(name, "--help")
    assert done.returncode == 0 and "--data" in done.stdout, done.stderr
