"""train.py started in this process, on the small host, and what its folder holds."""

import hashlib
import json

from lavender_min.tuning import command


def flags_of(vlm, maps, out, *more):
    return [
        "--data", "toy", "--vlm", vlm, "--maps", maps, "--limit", "16", "--match", "all", "--output_dir", str(out),
        "--max_steps", "4", "--logging_steps", "1", "--per_device_train_batch_size", "4", "--disable_tqdm", "true", *more,
    ]  # fmt: skip


def start(argv):
    """The exit code; 2 where argparse leaves with it."""
    try:
        return command.main([str(word) for word in argv])
    except SystemExit as stop:
        return stop.code


def digests(folder):
    """Each file of a folder, by its name."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.md5(path.read_bytes()).hexdigest() for path in files}


def weights(folder):
    """The bytes of what a run leaves."""
    return {name: (folder / name).read_bytes() for name in ("adapter_model.safetensors", "lavender.safetensors")}


def steps(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["step"] for entry in history if "loss" in entry]
